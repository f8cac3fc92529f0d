"""Figures of the demo, and the comparison with other toolkits."""
