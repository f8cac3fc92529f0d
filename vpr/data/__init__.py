"""Catalogues: readers, splits, duplicates, loaders, and the sample data."""
