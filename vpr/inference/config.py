"""Defaults of quantisation that its configuration shares. Imports no heavy library."""

# QAT fine-tuning keeps the linear layers of these modules in float by default: the first and the last.
DEFAULT_EXCLUDED_LAYERS = ("vit.to_patch_embedding", "vit.mlp_head")
