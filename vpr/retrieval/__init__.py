"""Embeddings, search, re-ranking and retrieval metrics."""
