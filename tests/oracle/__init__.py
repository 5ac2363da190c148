"""Slow, independent implementations of the published method, against which the project's pictures are held.

Nothing here imports the project's own code, so that no mistake can be shared.
"""
