"""`libmmvision_plugins.so`: the plugins' kernels compiled for many GPUs, and the TensorRT library they are put into."""
