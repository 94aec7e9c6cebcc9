# Everything runs in .venv, with the pins of constraints.txt: `make run` makes it for the experiments, `make setup` adds what
# tests, lint and documents need. PYTHON names another interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TOOLS := .venv/.tools
WITH_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: setup run test test-all test-lowest test-gpu bench-gpu lint docs

setup: $(TOOLS)

$(INSTALLED): pyproject.toml pipeline/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not; name another one: make PYTHON=python3.12 setup" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@echo "installing torch, transformers, DVC, MLflow and what they need into .venv: some minutes"
	@$(PIP) torch==2.13.0 -e ".[hf]" -e pipeline
	@touch $@

$(TOOLS): $(INSTALLED)
	@echo "installing the tools of developers into .venv"
	@$(PIP) -e ".[hf,onnx,gpu]" -e "pipeline[dev]"
	@touch $@

# The quick grid takes the place of the profile in params.yaml, unless that is one of your own.
# Exit code 3 says that the data of some task could not be had; the report shows which, and the rest is done.
run: $(INSTALLED)
	@$(WITH_PATH) $(BIN)/schoenbat-exp use quick
	@code=0; $(WITH_PATH) $(BIN)/schoenbat-exp run --grid || code=$$?; test $$code -eq 0 || test $$code -eq 3 || exit $$code

PYTEST := $(WITH_PATH) $(BIN)/python -m pytest

# Tests that share an expensive set-up stay in one process: their files are xdist groups.
test: setup
	$(PYTEST) -n 2 --dist loadgroup --durations=20 -m "not slow"

# After the quick tests, those that start grids, servers, browsers, TeX, Slurm, Sphinx, pip or compilers.
test-all: test
	$(PYTEST) -n 2 --dist loadgroup --durations=20 -m slow

# The lowest versions that pyproject.toml and pipeline/pyproject.toml allow, in an environment of their own.
test-lowest: setup
	mkdir -p build
	$(BIN)/python .ci/lowest_versions.py >build/lowest-versions.txt
	$(BIN)/python -m venv build/lowest
	build/lowest/bin/python -m pip install -q -c build/lowest-versions.txt \
	  torch==2.13.0 -e ".[hf,pretrained]" -e pipeline pytest pytest-xdist
	PATH="$(CURDIR)/build/lowest/bin:$$PATH" build/lowest/bin/python -m pytest -q -n 2 --dist loadfile tests/kernels \
	  tests/features tests/test_functional.py \
	  $(addprefix tests/pipeline/test_,record.py dvc.py clones.py statistics.py results_command.py)

test-gpu: setup
	SCHOENBAT_TRITON=1 $(PYTEST) -m gpu tests/gpu
	$(PYTEST) tests/ops/triton/test_triton_kernels.py

# Writes docs/gpu.csv and prints the tables of docs/gpu.md.
bench-gpu: setup
	SCHOENBAT_TRITON=1 $(BIN)/python benchmarks/gpu.py docs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy schoenbat pipeline

docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/docs
	@echo "build/docs/docs/index.html"
