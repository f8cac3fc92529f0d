"""Figures of latency and search, checked with pyperf, faiss and ranx."""
