"""The backends, the engine store, batching. `open_networks` wires a backend to the method."""
