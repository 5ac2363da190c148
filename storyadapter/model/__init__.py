"""One SDXL model with its image adapter: the contract of its networks, GRCA, and the modules."""
