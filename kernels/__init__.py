"""The Triton kernels, their launchers, and their ahead-of-time build. Importing this package registers nothing."""
