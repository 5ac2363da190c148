"""Quantization: recipes, calibration, scales as data, and layers that emulate it: the reference of every backend."""
