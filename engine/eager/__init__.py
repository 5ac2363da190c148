"""Backend `eager`: plain PyTorch, the reference and the baseline of benchmarks."""
