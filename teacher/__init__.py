"""Teacher: an OpenCLIP image tower fine-tuned on product images."""
