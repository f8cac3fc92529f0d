"""Fine-tunes an OpenCLIP image tower on product images."""
