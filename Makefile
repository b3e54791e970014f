# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STUDY = studies/reference
# the same question, answered here: a folder of its own, so that no committed answer is touched
RUN = studies/quickstart
QUESTION = study.toml splits.json model generated
# the scripts of studies/reference are kept as they trained the model
SOURCES = allocator tests notebooks studies/benchmark studies/calibration studies/device studies/faults studies/finish studies/padding studies/qwen3 studies/scale studies/structure studies/verbs
export ALLOCATOR_CACHE ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install quickstart test lint clean

install: $(VENV)/.installed

# torch first; PyPI's brings gigabytes of CUDA, docs/install.md says how to do without
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# search, finish the pick, write both containers, verify each in its runtime, compare on held-out
# documents, write a page to look at; then the committed answer beside this one, its checkpoints
# rebuilt to the recorded sha256
quickstart: install
	mkdir -p $(RUN)/out
	for name in $(QUESTION); do ln -sfnr $(STUDY)/$$name $(RUN)/$$name; done
	$(BIN)/allocator search $(RUN)
	$(BIN)/allocator finish $(RUN)/allocations/pick.json --tokens 24576
	$(BIN)/allocator materialize $(RUN)/allocations/pick.json $(RUN)/out/pick-gguf --container gguf --record
	$(BIN)/allocator materialize $(RUN)/allocations/pick.json $(RUN)/out/pick-safetensors --container safetensors --record
	$(BIN)/allocator verify $(RUN)/out/pick-gguf --study $(RUN)
	$(BIN)/allocator verify $(RUN)/out/pick-safetensors --study $(RUN)
	$(BIN)/allocator evaluate $(RUN)
	$(BIN)/allocator report $(RUN)
	$(BIN)/allocator diff $(RUN)/allocations/pick.json $(STUDY)/allocations/pick.json
	$(BIN)/allocator reproduce $(STUDY)/allocations/pick.json --out $(RUN)/out/committed

# two files of tests at a time, each on one core, in the order of tests/conftest.py
test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf .cache $(RUN) $(STUDY)/out
