"""A residual addition and the layer norm behind it in one kernel, and its launcher."""
