"""Latency of models on this machine: timing, stability, cold start, open-loop load, roofline."""
