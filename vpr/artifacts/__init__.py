"""Artifact directories: card, checksums, atomic writes, resumable run folders."""
