"""TensorRT engines: build, inspect, run."""
