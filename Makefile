# Two commands: `make demo` and `make test`. Every target sets up .venv by itself.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint bench clean help

help:
	@echo "make demo      train a small EDM2 on handwritten digits, end to end, in under 3 minutes"
	@echo "make test      the test suite, under 8 minutes on 2 cores"
	@echo "make test-all  the long tests too"
	@echo "make lint      ruff"
	@echo "make bench     speed and memory tables of this machine"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: " + sys.executable + " is Python " + sys.version.split()[0] + "; evenkeel needs 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt '.[demo,test]' && rm -rf build evenkeel.egg-info
	@touch $@

demo: $(VENV)/.installed
	$(PY) cluster/submit.py configs/quickstart.yaml

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow and not gpu" $(ARGS)

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m trainer.benchmark
	OMP_NUM_THREADS=1 $(PY) -m data_pipeline.benchmark

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
