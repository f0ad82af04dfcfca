# make setup | check | quick | test | demo. Everything lands in .venv; nothing is installed elsewhere.
.PHONY: setup check quick test demo other-build

PYTHON ?= python3
# cpu: no CUDA packages. auto: the build that fits the GPU of this machine.
# Not given: what is installed, and cpu at first.
HAVE := $(shell cat .venv/ready 2>/dev/null)
TORCH ?= $(or $(HAVE),cpu)
BIN := .venv/bin
TORCH_VERSION := $(shell sed -n "s/^torch==//p" constraints.txt)

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt $(if $(filter-out $(TORCH),$(HAVE)),other-build)
	@$(PYTHON) -m venv .venv || { echo "Next: apt install python3-venv, on Debian; then the same command"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	@# A CPU wheel that pip can see (a wheel folder, a mirror) is taken first; else uv knows where PyTorch keeps its builds.
	@if [ "$(TORCH)" != cpu ] || ! $(BIN)/python -m pip install --quiet "torch==$(TORCH_VERSION)+cpu" 2>/dev/null; then \
	  $(BIN)/uv pip install --python $(BIN)/python --torch-backend "$(TORCH)" --reinstall-package torch "torch==$(TORCH_VERSION)"; fi
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt -e ".[dev]"
	@echo $(TORCH) > .venv/ready

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

quick: setup
	@# No server, browser or finished chain: a minute or two.
	$(BIN)/python -m pytest -n 2 -m "not slow and not large and not gpu" $(ARGS)

test: setup
	@# Four, also on two cores: some tests wait for a server. In the order of the files, of which the longest come first.
	$(BIN)/python -m pytest -n 4 --no-loadscope-reorder $(ARGS)

demo: setup
	$(BIN)/deleatur demo
