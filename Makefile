# `make demo` and `make test` are all a newcomer needs; both set up .venv when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
GPU_STAMP := .venv/.installed-gpu
SCALE_STAMP := .venv/.installed-scale
TOPIC ?= demo
PARTS ?=

.PHONY: demo demo-full test test-all test-gpu check lint figures readme architecture scale other-quantisers other-metrics other-toolkits clean

demo: $(STAMP)
	@$(BIN)/vpr demo

demo-full: $(STAMP)
	@$(BIN)/vpr demo --full true

test: $(STAMP)
	@$(BIN)/python -m pytest

test-all: $(STAMP)
	@$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(GPU_STAMP)
	@$(BIN)/python -m pytest -m gpu -rs

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: lint test

figures: $(STAMP)
	@$(BIN)/python -m benchmarks.figures_$(TOPIC) $(PARTS)
	@$(MAKE) --no-print-directory readme

readme: $(STAMP)
	@$(BIN)/python -m benchmarks.figures

architecture: $(STAMP)
	@$(BIN)/python -m benchmarks.imports

# Ray, for embedding on several machines; it needs nothing that clashes with ours.
scale: $(SCALE_STAMP)

# Tools that INT8 is compared with; their requirements clash with ours and with each other's.
other-quantisers:
	@test -x .venv-nncf/bin/python || $(PYTHON) -m venv .venv-nncf
	@.venv-nncf/bin/python -m pip install --quiet nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.31.1
	@test -x .venv-modelopt/bin/python || $(PYTHON) -m venv .venv-modelopt
	@.venv-modelopt/bin/python -m pip install --quiet "nvidia-modelopt[onnx]==0.47.0"

# ranx, which our metrics are compared with, brings numba.
other-metrics:
	@test -x .venv-ranx/bin/python || $(PYTHON) -m venv .venv-ranx
	@.venv-ranx/bin/python -m pip install --quiet ranx==0.3.21

# The peers of our whole road: lightly-train, which exports a student by its own code (5 GB, with torch), and ONNX
# Runtime's quantiser. onnxslim and timm are what lightly-train's ONNX export and its timm models need.
other-toolkits:
	@test -x .venv-lightly/bin/python || $(PYTHON) -m venv .venv-lightly
	@.venv-lightly/bin/python -m pip install --quiet lightly-train==0.18.0 torch==2.12.1 torchvision==0.27.1 \
		timm==1.0.31 onnx==1.23.2 onnxruntime==1.31.1 onnxslim==0.1.98
	@test -x .venv-onnxruntime/bin/python || $(PYTHON) -m venv .venv-onnxruntime
	@.venv-onnxruntime/bin/python -m pip install --quiet onnx==1.23.2 onnxruntime==1.31.1

clean:
	rm -rf .venv runs build *.egg-info

$(GPU_STAMP): requirements-gpu.txt $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-gpu.txt
	@touch $@

$(SCALE_STAMP): requirements-scale.txt $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-scale.txt
	@touch $@

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (about 2 minutes and 6 GB, once)"
	@date +%s > .venv-started
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@echo "$$(($$(date +%s) - $$(cat .venv-started)))" > $(STAMP)
	@rm -f .venv-started
