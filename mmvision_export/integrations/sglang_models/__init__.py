"""A package of models for SGLang, named by `SGLANG_EXTERNAL_MODEL_PACKAGE`.

```
MMVISION_MODEL=engines/MiniMax-M3 \
SGLANG_EXTERNAL_MODEL_PACKAGE=mmvision_export.integrations.sglang_models \
python -m sglang.launch_server --model-path MiniMaxAI/MiniMax-M3 --encoder-only
```

SGLang looks for classes in the package's modules, and takes the name of a class for the
architecture.
"""
