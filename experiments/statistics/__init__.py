"""Simulations of the statistics, where the truth is known, and their speed."""
