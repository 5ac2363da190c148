"""The Triton kernels, a folder per family, and their tiles. Importing this package registers nothing."""
