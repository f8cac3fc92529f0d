"""Storage of a gallery: recall, bytes and time of vector formats, dimensions and indexes."""
