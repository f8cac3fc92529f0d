"""Export of students: ONNX graphs in FP32, FP16, INT8 and FP8, TensorRT engines, and serving with Triton."""
