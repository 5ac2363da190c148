"""Text and reference attention in one kernel, its launcher, and its ahead-of-time build."""
