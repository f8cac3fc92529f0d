"""Recall, latency and scale of the user's models, and the report of them."""
