# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STUDY ?= studies/reference
OUT = $(STUDY)/out
# the scripts of studies/reference are kept as they trained the model
SOURCES = allocator tests notebooks studies/benchmark studies/device studies/scale
export ALLOCATOR_CACHE ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install quickstart test lint clean

install: $(VENV)/.installed

# torch first and pinned: an unpinned one may bring gigabytes of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# search, write both containers, verify each in its runtime, compare on held-out documents
quickstart: install
	$(BIN)/allocator search $(STUDY)
	mkdir -p $(OUT)
	$(BIN)/allocator materialize $(STUDY)/allocations/pick.json $(OUT)/pick-gguf --container gguf --record
	$(BIN)/allocator materialize $(STUDY)/allocations/pick.json $(OUT)/pick-safetensors --container safetensors --record
	$(BIN)/allocator verify $(OUT)/pick-gguf --study $(STUDY)
	$(BIN)/allocator verify $(OUT)/pick-safetensors --study $(STUDY)
	$(BIN)/allocator evaluate $(STUDY)

# two files of tests at a time, each on one core
test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf .cache $(OUT) $(STUDY)/journal* $(STUDY)/search.lock $(STUDY)/search.start
