"""The backends, the engine store, and the one function that wires a backend to the method: `opening.open_networks`."""
