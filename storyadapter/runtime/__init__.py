"""Frames of stories, drawn on networks that a backend gives: jobs, batches, the reference bank, memory."""
