"""Recall of models on the same queries, with intervals and paired differences."""
