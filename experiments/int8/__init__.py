"""Figures of INT8: methods, other quantisers, speed, engines on a GPU."""
