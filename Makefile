# Two commands: `make demo` and `make test`. Every target sets up .venv by itself.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_RETRIES := 10

.PHONY: demo test test-all chaos lint bench experiments clean help

help:
	@echo "make demo      train a small EDM2 on handwritten digits, end to end, in under 3 minutes"
	@echo "make test      the test suite, under 8 minutes on 2 cores"
	@echo "make test-all  the long tests, and those of the optional dependencies"
	@echo "make chaos     hit a small run 50 times (kill -9, signals, full disk, damaged files); nothing may be lost"
	@echo "make lint      ruff"
	@echo "make bench     speed and memory tables of this machine"
	@echo "make experiments  noise densities, U-Nodes and noise robustness compared on digits: 35 minutes of a core; goes on where stopped"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: " + sys.executable + " is Python " + sys.version.split()[0] + "; evenkeel needs 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt '.[demo,test]' && rm -rf build evenkeel.egg-info
	@touch $@

demo: $(VENV)/.installed
	$(PY) cluster/submit.py configs/quickstart.yaml

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not extras and not gpu" $(ARGS)

# torchvision comes with mosaicml-streaming and does not import beside a CPU build of torch; nothing here needs it
$(VENV)/.extras: $(VENV)/.installed
	$(PY) -m pip install -q -c constraints.txt '.[mds,vae,remote,test-extras]' && rm -rf build evenkeel.egg-info
	@$(PY) -c 'import torchvision' 2>/dev/null || $(PY) -m pip uninstall -q -y torchvision
	@touch $@

test-all: $(VENV)/.extras
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "(slow or extras) and not gpu" $(ARGS)

chaos: $(VENV)/.installed
	$(PY) -m tests.chaos --hits 50 $(ARGS)

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m trainer.benchmark
	OMP_NUM_THREADS=1 $(PY) -m trainer.benchmark --preset xxs --micro-batch 1 --steps 2
	OMP_NUM_THREADS=1 $(PY) -m trainer.benchmark --table sampling --batch 8 --steps 1
	OMP_NUM_THREADS=1 $(PY) -m trainer.pauses
	OMP_NUM_THREADS=1 $(PY) -m trainer.benchmark --table optimizer
	OMP_NUM_THREADS=1 $(PY) -m data_pipeline.benchmark
	OMP_NUM_THREADS=1 $(PY) -m trainer.posthoc_benchmark

experiments: $(VENV)/.installed
	for name in noise unode robustness preset; do $(PY) -m trainer.experiments $$name $(ARGS) || exit; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
