"""The two compiled libraries: TensorRT plugins with kernels for many GPUs, and operators for AMX."""
