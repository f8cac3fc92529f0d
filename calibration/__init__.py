"""Decides what INT8 means for a model: which pictures, which ranges."""
