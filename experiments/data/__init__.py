"""Figures about the data: what a large catalogue costs."""
