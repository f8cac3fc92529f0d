"""Turns a student into what runs: ONNX graphs in FP32, FP16 and INT8, and TensorRT engines."""
