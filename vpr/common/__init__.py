"""Errors, logging, hardware, processes and file locks."""
