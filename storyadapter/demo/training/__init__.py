"""How the demo model was made: the picture book that it learned from, and the training. Not in the wheel."""
