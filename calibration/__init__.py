"""Decides what INT8 means for a model: which images, which ranges."""
