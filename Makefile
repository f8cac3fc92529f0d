# `make demo` and `make test` set up .venv if it is missing or out of date. `make help` lists all targets.
PYTHON ?= python3
BIN := .venv/bin
# `make REQUIREMENTS=requirements.lock test` installs the locked versions with their hashes, tests and lint included.
REQUIREMENTS ?= requirements.txt
DEV_REQUIREMENTS := $(if $(filter %.lock,$(REQUIREMENTS)),$(REQUIREMENTS),requirements-dev.txt)
# The lock contains the build backend; without the lock, pip downloads it for the build.
BUILD = $(if $(filter %.lock,$(REQUIREMENTS)),--no-build-isolation)
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
GPU_STAMP := .venv/.installed-gpu
SCALE_STAMP := .venv/.installed-scale
FUZZ_STAMP := .venv/.installed-fuzz
PHOTOS_STAMP := .venv/.installed-photos
GALLERY_STAMP := .venv/.installed-gallery
TOPIC ?= demo
PARTS ?=
# Processes of make test; each needs 3 GB of memory.
PROCESSES ?= 2
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# Flags of make gpu-check, such as CHECK=--rehearse.
CHECK ?=
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo demo-full test test-all test-gpu gpu-check reliability check lint figures docs lock audit licences scale gallery fuzzer photos-weights \
	other-quantisers other-metrics other-toolkits other-databases oldest-runtime clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-18s %s\n", $$1, $$2 }'

demo: $(STAMP) ## run the full pipeline on the sample
	@$(BIN)/vpr demo

demo-full: $(STAMP) ## run the long demo, about an hour
	@$(BIN)/vpr demo --full

# One thread for each process: more would oversubscribe the cores. Without a restart, a lost process ends the tests and is named;
# with one, pytest-xdist waits for ever.
test: $(DEV_STAMP) ## run the fast tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --max-worker-restart 0

test-all: $(DEV_STAMP) $(FUZZ_STAMP) ## run all tests that need no GPU, for hours
	@$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(DEV_STAMP) $(GPU_STAMP) ## run the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu -rs

# Runs without .venv too: a GPU may be available on a machine that has PyTorch but no network. Wheels in .wheels are used.
gpu-check: ## measure this machine's GPU within nine minutes, see docs/gpu.md
	@test ! -d .wheels || $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .wheels/site .wheels/*.whl
	@PYTHONPATH=.wheels/site:. $(GPU_PYTHON) -m experiments.gpu_check $(CHECK)

reliability: $(DEV_STAMP) $(FUZZ_STAMP) ## run the long fuzzing, fault, load, offline and soak tests
	@$(BIN)/python -m pytest -m reliability

check: lint test ## run lint and the fast tests

lint: $(DEV_STAMP) ## check format, types and import direction
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

figures: $(DEV_STAMP) ## measure TOPIC (all of it, or PARTS="..."), and record it in docs/results
	@$(BIN)/python -m $(if $(filter reliability,$(TOPIC)),tests.reliability,experiments.$(TOPIC)).figures $(PARTS)
	@$(MAKE) --no-print-directory docs

docs: $(DEV_STAMP) ## draw the tables of README.md and docs/ from docs/results
	@$(BIN)/python -m experiments.figures

# uv resolves in its own environment.
lock: ## update requirements.lock from requirements.txt and requirements-dev.txt
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv==0.13.9; }
	@{ echo "# Linux x86-64, Python 3.11 to 3.14: requirements.txt, requirements-dev.txt and all their dependencies, with hashes."; \
	   echo "# Written by make lock; pip install --require-hashes -r requirements.lock"; \
	   .venv-lock/bin/uv pip compile requirements.txt requirements-dev.txt --universal --python-version 3.11 \
	     --generate-hashes --no-annotate --no-header --quiet; } > requirements.lock.partial \
	  && mv requirements.lock.partial requirements.lock

# --strict: a package that cannot be looked up is an error.
audit: .venv-audit/.installed ## check requirements.lock for known vulnerabilities
	@.venv-audit/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off --requirement requirements.lock

# cuda-toolkit is a metapackage without files and states no licence.
licences: $(DEV_STAMP) .venv-audit/.installed ## write docs/licences.md, the licences of the packages in requirements.lock
	@{ printf '# Licences\n\n'; \
	   printf '`make licences` writes this page with pip-licenses for the packages in `requirements.lock`. The toolkit itself is\n'; \
	   printf 'under [Apache-2.0](../LICENSE). `vpr/data/sample/ATTRIBUTION.csv` lists the licences of the sample. The metapackage\n'; \
	   printf '`cuda-toolkit` is left out: it has no files.\n\n'; \
	   .venv-audit/bin/pip-licenses --python=$(BIN)/python --from=mixed --with-system --no-version --format=markdown \
	     --fail-on=UNKNOWN --ignore-packages cuda-toolkit \
	     --packages $$(sed -n 's/^\([a-z0-9._-]*\)==.*/\1/p' requirements.lock | sort -u); } > docs/licences.partial \
	  && mv docs/licences.partial docs/licences.md

scale: $(SCALE_STAMP) ## install Ray, to embed on several machines

gallery: $(GALLERY_STAMP) ## install LanceDB, for galleries that change

fuzzer: $(FUZZ_STAMP) ## install atheris, for coverage-guided fuzzing

photos-weights: $(PHOTOS_STAMP) ## install ImageNet weights, for the experiments on photographs

# The requirements of these tools clash with those of the toolkit and with each other.
other-quantisers: ## install NNCF and ModelOpt, each in its own environment
	@test -x .venv-nncf/bin/python || $(PYTHON) -m venv .venv-nncf
	@.venv-nncf/bin/python -m pip install --quiet nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.31.1
	@test -x .venv-modelopt/bin/python || $(PYTHON) -m venv .venv-modelopt
	@.venv-modelopt/bin/python -m pip install --quiet "nvidia-modelopt[onnx]==0.47.0"

# ranx depends on numba.
other-metrics: ## install ranx and cleanlab, each in its own environment
	@test -x .venv-ranx/bin/python || $(PYTHON) -m venv .venv-ranx
	@.venv-ranx/bin/python -m pip install --quiet ranx==0.3.21
	@test -x .venv-cleanlab/bin/python || $(PYTHON) -m venv .venv-cleanlab
	@.venv-cleanlab/bin/python -m pip install --quiet cleanlab==2.9.0 scikit-learn==1.9.1

# lightly-train takes 5 GB with torch; its ONNX export needs onnxslim, its timm models timm.
other-toolkits: ## install lightly-train and ONNX Runtime's quantiser, each in its own environment
	@test -x .venv-lightly/bin/python || $(PYTHON) -m venv .venv-lightly
	@.venv-lightly/bin/python -m pip install --quiet lightly-train==0.18.0 torch==2.12.1 torchvision==0.27.1 \
		timm==1.0.31 onnx==1.23.2 onnxruntime==1.31.1 onnxslim==0.1.98
	@test -x .venv-onnxruntime/bin/python || $(PYTHON) -m venv .venv-onnxruntime
	@.venv-onnxruntime/bin/python -m pip install --quiet onnx==1.23.2 onnxruntime==1.31.1

# pgvector is an extension of a PostgreSQL server and has no embedded form.
other-databases: ## install LanceDB, Milvus Lite and Qdrant's client, each in its own environment
	@for name in lancedb==0.40.0 "pymilvus[milvus_lite]==3.0.2 milvus-lite==3.2.2" qdrant-client==1.20.0; do \
		folder=.venv-$$(echo $$name | cut -d= -f1 | cut -d[ -f1); \
		test -x $$folder/bin/python || $(PYTHON) -m venv $$folder; \
		$$folder/bin/python -m pip install --quiet $$name numpy==2.4.6 faiss-cpu==1.15.1 psutil==7.2.2 || exit 1; done

oldest-runtime: ## install the oldest ONNX Runtime of the Triton hand-off in its own environment, for its tests
	@test -x .venv-oldest-runtime/bin/python || $(PYTHON) -m venv .venv-oldest-runtime
	@.venv-oldest-runtime/bin/python -m pip install --quiet onnxruntime==1.20.1 numpy==2.4.6

clean: ## remove .venv, runs and build files
	rm -rf .venv runs build *.egg-info

.venv-audit/.installed:
	@test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1 pip-licenses==5.5.5
	@touch $@

$(DEV_STAMP): $(DEV_REQUIREMENTS) $(STAMP)
	@$(PIP) -r $(DEV_REQUIREMENTS)
	@touch $@

$(GPU_STAMP): requirements-gpu.txt $(STAMP)
	@$(PIP) -r requirements-gpu.txt
	@touch $@

$(SCALE_STAMP): requirements-scale.txt $(STAMP)
	@$(PIP) -r requirements-scale.txt
	@touch $@

$(GALLERY_STAMP): requirements-gallery.txt $(STAMP)
	@$(PIP) -r requirements-gallery.txt
	@touch $@

$(PHOTOS_STAMP): requirements-photos.txt $(STAMP)
	@$(PIP) -r requirements-photos.txt
	@touch $@

$(FUZZ_STAMP): requirements-fuzz.txt $(STAMP)
	@$(PIP) -r requirements-fuzz.txt
	@touch $@

# The stamp of a new environment holds the seconds of its installation, which `make figures TOPIC=demo` adds to those of the
# demo. An update leaves it empty. pip compiles in one process, compileall in one for each core; it fails where a package has
# a file that is no Python, which pip passes over too.
$(STAMP): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (about 2 minutes and 6.5 GB, once)"
	@rm -f .venv-started
	@test -x $(BIN)/python || { date +%s > .venv-started; $(PYTHON) -m venv .venv; }
	@$(PIP) --no-compile -r $(REQUIREMENTS)
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@$(PIP) --no-deps $(BUILD) --editable .
	@{ test ! -f .venv-started || echo "$$(($$(date +%s) - $$(cat .venv-started)))"; } > $(STAMP).partial && mv $(STAMP).partial $(STAMP)
	@rm -f .venv-started
