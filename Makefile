# Thin wrappers over the commands that CONTRIBUTING.md lists.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := engines/demo
DEMO := .demo

.PHONY: help setup sbom demo bench test test-slow check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, then export, check and run a small model on a photograph"
	@echo "make test       the tests, on all cores"
	@echo "make test-slow  the tests that take longer: the full-size model among them"
	@echo "make bench      measure against PyTorch, 20 minutes, and write docs/benchmarks.md"
	@echo "make check      ruff, clang-format, hadolint, mypy (TensorRT's calls against its type stubs too), import-linter"
	@echo "make sbom       write sbom.json: what is installed, with versions and licences (CycloneDX)"
	@echo "make clean      remove what these made"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else f'Python 3.10 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --report $(VENV)/installed-1.json --editable ".[dev]"
	# Of these the tests read files: a reference in the one, TensorRT's headers in the other. What the packages themselves
	# require is a training stack.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --report $(VENV)/installed-2.json --no-deps \
		"nemo-automodel; python_version >= '3.11'" kernel-lens
	$(BIN)/python scripts/pinned_hashes.py check $(VENV)/installed-?.json
	touch $@

sbom: setup
	$(PYTHON) -m venv $(VENV)-sbom
	$(VENV)-sbom/bin/python -m pip install --quiet cyclonedx-bom
	$(VENV)-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json $(BIN)/python
	@echo "sbom.json: what is installed in $(VENV), CycloneDX"

demo: setup
	@echo; echo "== 1/5 A small encoder with seeded random weights, exported to ONNX"
	$(BIN)/mmvision export --onnx --preset tiny --random-weights --seed 0 --output $(MODEL) --force
	@echo; echo "== 2/5 A float16 TensorRT-RTX engine for a GPU that need not be in this machine (Ada, 8.9)"
	$(BIN)/mmvision build-engine --fp16 --model $(MODEL) --backend tensorrt-rtx --compute-capability 8.9 \
		|| { test "`uname -sm`" != "Linux x86_64" && echo "skipped: TensorRT-RTX has no wheel for `uname -sm`"; }
	@echo; echo "== 3/5 Is each graph the same function as PyTorch in float64?"
	$(BIN)/mmvision parity --model $(MODEL)
	@echo; echo "== 4/5 A photograph"
	$(BIN)/python scripts/demo_photo.py $(DEMO)/photo.png
	@echo; echo "== 5/5 The photograph through ONNX Runtime on this CPU"
	$(BIN)/python -m mmvision_export.run --model $(MODEL) --backend onnxruntime-cpu \
		--image $(DEMO)/photo.png --output $(DEMO)/image_embeds.npy --force
	@echo; echo "Where everything is:"
	@ls -d $(DEMO)/* $(MODEL)/* $(MODEL)/plans/*.engine 2>/dev/null || true

bench: setup
	$(BIN)/mmvision export --onnx --preset shallow --random-weights --seed 0 --output engines/bench --force
	$(BIN)/mmvision quantize --cpu-int8 --model engines/bench
	$(BIN)/mmvision benchmark --model engines/bench --backend onnxruntime-cpu \
		--backend openvino `grep -qwE "avx512_bf16|amx_bf16|bf16" /proc/cpuinfo && echo --backend openvino-bf16` --precision fp32,int8 \
		--against transformers-eager,transformers-sdpa,transformers-sdpa-bf16,nemo,torch-eager,torch-eager-bf16,torch-compile,torch-compile-bf16 \
		--output .bench --page docs/benchmarks.md --force

test: setup
	$(BIN)/python -m pytest --numprocesses auto

test-slow: setup
	$(BIN)/python -m pytest --slow -m slow --numprocesses auto

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find plugins -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/mypy
	$(BIN)/python scripts/check_tensorrt_types.py
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find plugins -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) $(DEMO) $(MODEL) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
