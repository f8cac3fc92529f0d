"""Backends that run an artifact: PyTorch, ONNX Runtime, OpenVINO, TensorRT."""
