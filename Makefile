# Three commands do everything on a fresh machine: `make demo-quick`, `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
JOBS := $(shell [ "$$(nproc 2>/dev/null || echo 1)" -gt 1 ] && echo 2 || echo 1)

.PHONY: setup demo demo-quick test test-quick test-faults gpu-check lint clean

setup: $(VENV)/.ready

# The marker is touched last, so an interrupted set-up starts again.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,plot,engines]'
	touch $@

# At the size of a demo a classifier or scorer may be weak: it is said, and the demo goes on.
demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python train/pipeline.py \
		--recipe train/recipes/demo.yaml --output_dir $(RUN) --launcher python --jobs $(JOBS) \
		--threads_per_job 1 --clean checkpoints --go_on $(DEMO_FLAGS)

# Two minutes on two cores: a BERT of two layers and a vocabulary of its own.
demo-quick: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python train/pipeline.py \
		--recipe train/recipes/demo_quick.yaml --output_dir $(RUN)-quick --launcher python \
		--go_on $(DEMO_FLAGS)

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --durations=15

test-quick: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not slow"

# The long campaign: kills at every moment, damage to every byte. SELMASK_FAULT_SEED varies them.
test-faults: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m faults -s

# On a fresh machine with a GPU and without network: make gpu-check WHEELS=FOLDER; seven minutes.
gpu-check:
	$(PYTHON) tests/support/gpu_check.py --wheels "$(WHEELS)" $(GPU_CHECK_FLAGS)

lint: setup
	$(BIN)/ruff check selmask.py preprocess train csrc tests
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
