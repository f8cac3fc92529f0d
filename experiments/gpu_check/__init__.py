"""Measurements of a GPU within nine minutes, each recorded as soon as it is made."""
