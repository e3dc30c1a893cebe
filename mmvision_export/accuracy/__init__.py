"""How accurate a graph is, stage by stage, and the report that shows it.

`parity.py` asks whether each graph of a model directory is the same function as the PyTorch encoder; this package finds
where it is not: `stages` says what is compared, `rounded` runs a graph in exactly the types it was written in, `layers`
compares stage by stage.
"""
