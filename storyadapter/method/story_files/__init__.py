"""Story files of every form, read into plain values that know the lines they stand on."""
