"""The custom operators of domain `mmvision`: a folder for each, found through one registry.

An op's folder has two modules. `onnx_op.py` says what its node takes and gives, and which standard
ops define it. `torch_op.py` is what PyTorch runs, and how the tracer writes it as one node. Only
the second needs PyTorch, which a machine that builds engines does not have.

| op | inputs | attributes | outputs |
| --- | --- | --- | --- |
| `VarlenAttention` | q, k, v `[N, heads, head_dim]`, cu_seqlens int32 `[S+1]` | scale | out, as q |
| `QKRotaryEmbedding` | q, k `[N, heads, head_dim]`, cos, sin f32 `[N, rope_dim/2]` | | as q, k |
"""
