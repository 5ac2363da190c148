"""ONNX export of the contract's networks, and the check of what was exported."""
