# Each target does all of its own set-up and can be run again at once. `make help` lists them.
# Other machines: `make demo PYTHON=/path/to/python3.11`; pip's own options, such as an index of CPU builds of torch, go in PIP_FLAGS.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
STAMP := $(VENV)/.made-for-these-pins

T2T := .venv-t2t
T2T_STAMP := $(T2T)/.made-for-these-pins

# Tensor2Tensor's own time: a Python 3.7, where there is one that runs.
PYTHON37 ?= $(shell for python in "$$(command -v python3.7)" "$$HOME"/.pyenv/versions/3.7.*/bin/python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 7))' 2>/dev/null && echo "$$python" && break; done)
TF1 := .venv-t2t-tf1
TF1_STAMP := $(TF1)/.made-for-these-pins

XLA := .venv-xla
XLA_STAMP := $(XLA)/.made-for-these-pins
XLA_PIP := $(XLA)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints/xla.txt

SITE := .venv-docs
SITE_STAMP := $(SITE)/.made-for-these-pins

PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.made-for-these-pins

need_python311 = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	{ echo "error: the pins are for Python 3.11; give one: make $(1) PYTHON=/path/to/python3.11" >&2; exit 1; }

BUDGET ?= 150s
OUT ?= runs/demo
MT_BUDGET ?= 240s
MT_OUT ?= runs/demo-mt
DEMO_FLAGS ?=
EXPERIMENT ?=
CONFIG ?=
SET ?=
STUDY_FLAGS ?=

# Environments may be made at the same time, but each install of this checkout writes into it.
ALONE := $(if $(shell command -v flock),flock setup.py)

export PYTHONUNBUFFERED := 1
# Nothing is left outside the checkout, caches included.
export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib

.PHONY: help env env-t2t env-t2t-tf1 env-xla env-peers demo demo-mt study study-times study-publish docs test test-t2t test-t2t-tf1 test-xla lint bench clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

env: $(STAMP)  ## the environment for fairseq, in .venv; made again when a pin changes

# fairseq-fixed comes as source, and its build imports torch: built in isolation it would download another torch of several GB.
$(STAMP): constraints/fairseq.txt setup.py
	@echo "making $(VENV) (a few minutes the first time) ..."
	$(call need_python311,env)
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints/fairseq.txt pip setuptools wheel
	$(PIP) --constraint constraints/fairseq.txt torch numpy Cython ninja
	$(PIP) --constraint constraints/fairseq.txt --no-build-isolation fairseq-fixed
	$(ALONE) $(PIP) --constraint constraints/fairseq.txt --no-build-isolation --editable '.[fairseq,pack,hf,report,study,dev]'
	touch $@

env-t2t: $(T2T_STAMP)  ## the environment for Tensor2Tensor on TensorFlow 2.12, in .venv-t2t

$(T2T_STAMP): constraints/t2t.txt setup.py
	@echo "making $(T2T) (a minute or two) ..."
	$(call need_python311,env-t2t)
	rm -rf $(T2T)
	$(PYTHON) -m venv $(T2T)
	$(T2T)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints/t2t.txt setuptools wheel
	$(ALONE) $(T2T)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints/t2t.txt \
		--no-build-isolation --editable '.[t2t]' tensorflow-cpu pytest pytest-xdist hypothesis
	touch $@

env-t2t-tf1: $(TF1_STAMP)  ## the same on TensorFlow 1.15, in .venv-t2t-tf1: PYTHON37=/path/to/python3.7

$(TF1_STAMP): constraints/t2t-tf1.txt setup.py
	@test -n "$(PYTHON37)" || \
		{ echo "error: no Python 3.7 was found; give one: make env-t2t-tf1 PYTHON37=/path/to/python3.7" >&2; exit 1; }
	@echo "making $(TF1) (a minute) ..."
	rm -rf $(TF1)
	$(PYTHON37) -m venv $(TF1)
	$(TF1)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints/t2t-tf1.txt setuptools wheel
	$(ALONE) $(TF1)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints/t2t-tf1.txt \
		--no-build-isolation --editable '.[t2t]' tensorflow pytest pytest-xdist hypothesis
	touch $@

env-xla: $(XLA_STAMP)  ## the environment for fairseq on torch-xla, in .venv-xla

# torch 2.9.0 is the newest that torch-xla pairs with. On PyPI it is a CUDA build of several GB; an index of CPU builds, in PIP_FLAGS, is enough.
$(XLA_STAMP): constraints/xla.txt setup.py
	@echo "making $(XLA) (several minutes, and several GB) ..."
	$(call need_python311,env-xla)
	rm -rf $(XLA)
	$(PYTHON) -m venv $(XLA)
	$(XLA_PIP) pip setuptools wheel
	$(XLA_PIP) torch torch-xla numpy Cython ninja
# Not from the cache: a build for .venv is one for another torch.
	$(XLA_PIP) --no-build-isolation --no-cache-dir fairseq-fixed
	$(ALONE) $(XLA_PIP) --no-build-isolation --editable '.[fairseq,xla]' pytest pytest-xdist hypothesis
	touch $@

demo: $(STAMP)  ## the whole study on two cores: BUDGET=10m gives each size longer, OUT=runs/demo
	$(BIN)/python user_dir_examples/pocket/demo.py --budget $(BUDGET) --out $(OUT) $(DEMO_FLAGS)

demo-mt: $(STAMP) $(T2T_STAMP)  ## English to French in Tensor2Tensor, several sizes: MT_BUDGET=5m gives each longer
	$(BIN)/python user_dir_examples/pocket_mt/demo.py --budget $(MT_BUDGET) --out $(MT_OUT) --t2t $(T2T)/bin/python $(DEMO_FLAGS)

study: $(STAMP) $(if $(EXPERIMENT),$(if $(findstring translation,$(EXPERIMENT)),$(T2T_STAMP)),$(T2T_STAMP))  ## every experiment of the paper at pocket scale: EXPERIMENT=depth one, CONFIG=my.yaml, SET="budget=60s", STUDY_FLAGS
	$(BIN)/python user_dir_examples/study/study.py --experiment "$(EXPERIMENT)" $(if $(CONFIG),--config "$(CONFIG)") \
		$(if $(SET),--set $(SET)) $(STUDY_FLAGS)

study-times: $(STAMP) $(if $(EXPERIMENT),$(if $(findstring translation,$(EXPERIMENT)),$(T2T_STAMP)),$(T2T_STAMP))  ## seconds per update of all that the study trains, on this machine, which should be quiet; EXPERIMENT, CONFIG, SET as of study
	OMP_NUM_THREADS=1 $(BIN)/python user_dir_examples/study/step_times.py --experiment "$(EXPERIMENT)" $(if $(CONFIG),--config "$(CONFIG)") \
		$(if $(SET),--set $(SET))

study-publish: $(STAMP)  ## the experiments that the study has finished into docs/results, with the report of all that is there; EXPERIMENT, CONFIG, SET as of study
	$(BIN)/python user_dir_examples/study/study.py --report-only --publish docs/results --experiment "$(EXPERIMENT)" \
		$(if $(CONFIG),--config "$(CONFIG)") $(if $(SET),--set $(SET))

$(SITE_STAMP): constraints/docs.txt
	$(call need_python311,docs)
	rm -rf $(SITE)
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints/docs.txt \
		mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

docs: $(SITE_STAMP)  ## the documentation's site, in runs/site
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet --strict

# Whole files to a core, in the order of tests/conftest.py.
BY_FILE := --dist loadfile --no-loadscope-reorder

# Environments first, and two at a time: pip and the compiler keep one core busy each.
test:  ## lint, types, the docs and every test, those of TensorFlow 1 where there is a Python 3.7
	@$(MAKE) --no-print-directory --jobs 2 $(STAMP) $(XLA_STAMP) $(T2T_STAMP) $(if $(PYTHON37),$(TF1_STAMP)) $(SITE_STAMP)
	@$(MAKE) --no-print-directory lint docs test-t2t test-xla $(if $(PYTHON37),test-t2t-tf1)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(BY_FILE)

test-t2t: $(T2T_STAMP)  ## the tests of the Tensor2Tensor plugin
	$(T2T)/bin/python -m pytest tests/t2t_problems --numprocesses 2 $(BY_FILE)

test-t2t-tf1: $(TF1_STAMP)  ## the same on TensorFlow 1.15
	$(TF1)/bin/python -m pytest tests/t2t_problems --numprocesses 2 --dist loadfile

test-xla: $(XLA_STAMP)  ## the tests of fairseq on torch-xla, on its CPU device
	$(XLA)/bin/python -m pytest tests/xla --numprocesses 2 $(BY_FILE)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

env-peers: $(PEERS_STAMP)  ## the libraries that `make bench` compares with, in .venv-peers

$(PEERS_STAMP): constraints/peers.txt
	$(call need_python311,env-peers)
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --requirement constraints/peers.txt
	touch $@

bench: $(STAMP) $(PEERS_STAMP) $(T2T_STAMP) $(XLA_STAMP)  ## speed and size beside other libraries, measured on this machine into bench/*.csv
	PYTHONPATH=. $(BIN)/python bench/pruning_step.py 24
	PYTHONPATH=. $(BIN)/python bench/packing.py
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python bench/shrink.py 15
	PYTHONPATH=. $(BIN)/python bench/latency.py --peers $(PEERS)/bin/python
	PYTHONPATH=. $(BIN)/python bench/close_calls.py --demo $(OUT) --sentences runs/downloads/movie-reviews/reviews.tsv
	PYTHONPATH=.:user_dir_examples/pocket $(BIN)/python bench/exported_labels.py --demo $(OUT) \
		--sentences runs/downloads/movie-reviews/reviews.tsv
	PYTHONPATH=. $(PEERS)/bin/python bench/coding.py
	PYTHONPATH=. $(PEERS)/bin/python bench/file_size.py --demo $(OUT)
	PYTHONPATH=. $(PEERS)/bin/python bench/limit.py
	PYTHONPATH=. $(PEERS)/bin/python bench/trellis.py
	$(BIN)/train-large prepare-text runs/downloads/wikitext-2/train.txt --documents wikitext \
		--valid runs/downloads/wikitext-2/valid.txt --vocabulary-size 8192 --subsets "" --out runs/bench/text-8192
	PYTHONPATH=. $(BIN)/python bench/training_profile.py runs/bench/text-8192/data-bin
	PYTHONPATH=. $(BIN)/python bench/training_speed.py $(OUT)/text/data-bin runs/bench/text-8192/data-bin \
		--peers $(PEERS)/bin/python
	PYTHONPATH=. $(BIN)/python bench/training_loss.py runs/bench/text-8192/data-bin --peers $(PEERS)/bin/python
	PYTHONPATH=. $(BIN)/python bench/training_overhead.py runs/bench/text-8192/data-bin
	PYTHONPATH=. $(BIN)/python bench/training_layer.py
	$(BIN)/python user_dir_examples/study/study.py --experiment depth,width --set budget=100s out=runs/pilots
	PYTHONPATH=.:user_dir_examples/study $(BIN)/python bench/planning.py runs/pilots
	PYTHONPATH=. $(BIN)/python bench/planning_speed.py
	PYTHONPATH=. $(T2T)/bin/python bench/translation_step.py
	PYTHONPATH=. $(XLA)/bin/python bench/projection.py
	PYTHONPATH=.:user_dir_examples/pocket $(BIN)/python bench/rate.py --demo $(OUT) --model runs/downloads/minilm.safetensors

clean:  ## remove the environments and what tools left; runs/, with what was trained, stays
	rm -rf $(VENV) $(T2T) $(TF1) $(XLA) $(PEERS) $(SITE) build .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache
