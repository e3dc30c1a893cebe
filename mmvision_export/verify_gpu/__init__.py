"""What has never run on a GPU, run there, and written down to be sent back.

First our kernels by the driver alone, against stored float64 results. `pack` makes a folder of that
on a build machine. The folder needs Python, NumPy and `libcuda.so.1` and nothing of this package:
`python3 FOLDER` runs it, and writes what it found beside it. Then, where the whole package is, the
engines of a model directory: see `whole`.
"""
