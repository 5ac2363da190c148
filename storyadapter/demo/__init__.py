"""The demo model: a tiny SDXL with an IP-Adapter, trained from scratch on a world of procedural pictures."""
