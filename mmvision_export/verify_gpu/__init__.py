"""What has never run on a GPU, run there: our kernels by the driver alone, against stored float64 results.

`pack` makes a folder on a build machine. The folder needs Python, NumPy and `libcuda.so.1` and nothing
of this package: `python3 FOLDER` runs it, and writes what it found beside it.
"""
