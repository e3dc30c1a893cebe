"""The custom operators of domain `mmvision`: PyTorch ops, ONNX schemas, and their definitions as ONNX functions."""
