"""TensorRT engines: building and running them."""
