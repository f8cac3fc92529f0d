"""The demo, the machine check, and the local search page."""
