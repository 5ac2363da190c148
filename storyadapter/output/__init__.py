"""What a run leaves on the disk: its folder, its record, the contact sheet, the GIF."""
