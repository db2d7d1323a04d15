# Each target does all of its own set-up and can be run again at once. `make help` lists them.
# Other machines: `make demo PYTHON=/path/to/python3.11`; pip's own options, such as an index of CPU builds of torch, go in PIP_FLAGS.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
STAMP := $(VENV)/.made-for-these-pins

PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.made-for-these-pins

BUDGET ?= 150s
OUT ?= runs/demo
DEMO_FLAGS ?=

export PYTHONUNBUFFERED := 1
# Nothing is left outside the checkout, caches included.
export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib

.PHONY: help env env-peers demo test lint bench clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

env: $(STAMP)  ## the environment for fairseq, in .venv; made again when a pin changes

# fairseq-fixed comes as source, and its build imports torch: built in isolation it would download another torch of several GB.
$(STAMP): constraints/fairseq.txt setup.py
	@echo "making $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: the pins are for Python 3.11; give one: make env PYTHON=/path/to/python3.11" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints/fairseq.txt pip setuptools wheel
	$(PIP) --constraint constraints/fairseq.txt torch numpy Cython ninja
	$(PIP) --constraint constraints/fairseq.txt --no-build-isolation fairseq-fixed
	$(PIP) --constraint constraints/fairseq.txt --no-build-isolation --editable '.[fairseq,pack,hf,report,dev]'
	touch $@

demo: $(STAMP)  ## the whole study on two cores: BUDGET=10m gives each size longer, OUT=runs/demo
	$(BIN)/python user_dir_examples/pocket/demo.py --budget $(BUDGET) --out $(OUT) $(DEMO_FLAGS)

test: $(STAMP) lint  ## lint, types and every test
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

env-peers: $(PEERS_STAMP)  ## the libraries that `make bench` compares with, in .venv-peers

$(PEERS_STAMP): constraints/peers.txt
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --requirement constraints/peers.txt
	touch $@

bench: $(STAMP) $(PEERS_STAMP)  ## speed and size beside other libraries, measured on this machine into bench/*.csv
	PYTHONPATH=. $(BIN)/python bench/pruning_step.py 24
	PYTHONPATH=. $(BIN)/python bench/packing.py
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python bench/shrink.py 15
	PYTHONPATH=. $(BIN)/python bench/latency.py --peers $(PEERS)/bin/python
	PYTHONPATH=. $(PEERS)/bin/python bench/coding.py
	PYTHONPATH=. $(PEERS)/bin/python bench/file_size.py --demo $(OUT)
	PYTHONPATH=.:user_dir_examples/pocket $(BIN)/python bench/rate.py --demo $(OUT) --model runs/downloads/minilm.safetensors

clean:  ## remove the environment and what runs left
	rm -rf $(VENV) $(PEERS) runs build .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache
