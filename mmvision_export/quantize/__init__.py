"""Quantised graphs.

8-bit flavours of a float32 model directory, kept only once they have passed an accuracy gate.

`formats` holds the arithmetic, `units` what is quantised together, `statistics` what calibration
measures, `balancing` what is computed from it, `qdq` and `dynamic` the two kinds of graph,
`quantize` the whole.
"""
