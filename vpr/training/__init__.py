"""The training loop that teacher and student share."""
