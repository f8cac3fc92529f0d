"""ONNX graphs and sessions, INT8 scales, timing."""
