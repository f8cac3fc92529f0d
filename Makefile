# `make demo` and `make test` are all a newcomer needs; both set up .venv when it is missing or out of date.
PYTHON ?= python3
# The lock has what builds the package; without it pip fetches that for the moment of building.
BUILD = $(if $(filter %.lock,$(REQUIREMENTS)),--no-build-isolation)
BIN := .venv/bin
STAMP := .venv/.installed
GPU_STAMP := .venv/.installed-gpu
SCALE_STAMP := .venv/.installed-scale
FUZZ_STAMP := .venv/.installed-fuzz
# requirements.lock has the same with hashes, and the packages that they need.
REQUIREMENTS ?= requirements.txt
TOPIC ?= demo
PARTS ?=
# That make test takes; each needs 3 GB.
PROCESSES ?= 2

.PHONY: demo demo-full test test-all test-gpu check lint figures readme lock audit licences scale fuzzer \
	other-quantisers other-metrics other-toolkits clean

demo: $(STAMP)
	@$(BIN)/vpr demo

demo-full: $(STAMP)
	@$(BIN)/vpr demo --full true

# Files of tests are shared among the processes; their libraries' threads would only stand in each other's way.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

test-all: $(STAMP) $(FUZZ_STAMP)
	@$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(GPU_STAMP)
	@$(BIN)/python -m pytest -m gpu -rs

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint test

figures: $(STAMP)
	@$(BIN)/python -m benchmarks.figures_$(TOPIC) $(PARTS)
	@$(MAKE) --no-print-directory readme

readme: $(STAMP)
	@$(BIN)/python -m experiments.figures

# Ray, for embedding on several machines; it needs nothing that clashes with ours.
scale: $(SCALE_STAMP)

# atheris, for the coverage-guided fuzzer.
fuzzer: $(FUZZ_STAMP)

# The lock, made again by a resolver with an environment of its own; and what is known against the versions in it.
lock:
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv==0.13.9; }
	@{ echo "# Linux x86-64, Python 3.11 to 3.14: requirements.txt and all that it needs, with the hashes of PyPI's files."; \
	   echo "# Written by make lock; pip install --require-hashes -r requirements.lock"; \
	   .venv-lock/bin/uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes \
	     --no-annotate --no-header --quiet; } > requirements.lock.partial && mv requirements.lock.partial requirements.lock

audit: $(STAMP)
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit \
	  && .venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1; }
	@$(BIN)/python -m experiments.audit .venv-audit/bin/pip-audit

licences: $(STAMP)
	@$(BIN)/python -m experiments.licences

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

$(FUZZ_STAMP): requirements-fuzz.txt $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-fuzz.txt
	@touch $@

$(STAMP): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (about 2 minutes and 6 GB, once)"
	@date +%s > .venv-started
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(BUILD) --editable .
	@echo "$$(($$(date +%s) - $$(cat .venv-started)))" > $(STAMP)
	@rm -f .venv-started
