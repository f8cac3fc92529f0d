"""Data sets: what they mean, how sharp training views are, and which recipes equal their sources."""
