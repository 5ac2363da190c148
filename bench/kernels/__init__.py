"""The kernel benchmark: cases, baselines, limits of the device, report; and the candidates for tiles."""
