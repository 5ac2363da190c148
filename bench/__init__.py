"""One timing core, the cases, and the reports."""
