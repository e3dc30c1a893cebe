"""From a model directory to a TensorRT engine. Needs onnx, not torch."""
