"""The matrix product of a GEGLU layer with its activation in one kernel, and its launcher."""
