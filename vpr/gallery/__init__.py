"""Galleries that change: embedded images in a vector database, with ids, metadata and versions."""
