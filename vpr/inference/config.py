"""Defaults that quantisation shares with its configuration. Imports no heavy library."""

from __future__ import annotations

# Modules whose linears finishing leaves alone unless asked otherwise: the first and the last.
DEFAULT_EXCLUDED_LAYERS = ("vit.to_patch_embedding", "vit.mlp_head")
