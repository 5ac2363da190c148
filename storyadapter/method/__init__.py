"""The method of Story-Adapter: its published constants, stories, plans, samplers and noise, events and errors."""
