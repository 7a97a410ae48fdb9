# Everything runs in a virtual environment of its own; nothing needs a network beyond the package registry.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: quickstart model data test test-slow test-lowest lint docs

quickstart: $(VENV)/installed models/smollm2-135m
	HF_HUB_OFFLINE=1 $(BIN)/hf-dms prune recipes/quickstart.yaml

model: models/smollm2-135m models/minilm models/vit

data: models/movie-sentiment models/fashion-mnist

# two processes of one thread each; a file stays in one process, so that what its tests share is made once
test: $(VENV)/installed lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25

# with the lowest versions that pyproject.toml allows, for every release; warnings of old packages are no errors here
test-lowest: .venv-lowest/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-o filterwarnings=default

test-slow: $(VENV)/installed models/smollm2-135m
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile many

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

.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip compile --quiet --no-deps --resolution lowest-direct --extra quickstart --extra peft \
		--extra quantization --extra eval --extra detection --output-file .venv-lowest/lowest.txt pyproject.toml
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/lowest.txt --editable '.[test]'
	touch $@
