# Every target runs from a fresh checkout: `make quickstart` and `make test` set up what they need.

VENV   ?= .venv
# Which torch to install; for one from another index:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
# A Python of your choice: make setup PYTHON=/path/to/python3.11
PYTHON ?=

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.cgfedllm-setup

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all check format lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the virtual environment from pinned dependencies (instant if up to date)

$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	if [ ! -x $(PY) ]; then \
	  chosen=""; \
	  for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      chosen="$$candidate"; break; \
	    fi; \
	  done; \
	  if [ -z "$$chosen" ]; then \
	    echo "cgfedllm needs Python 3.11 or newer, and none was found as" \
	      "$(or $(PYTHON),python3.11, python3 or python). Please install one, or name yours:" \
	      "make setup PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$chosen" --version)"; \
	  "$$chosen" -m venv $(VENV); \
	fi
	@echo "Installing the pinned dependencies, a minute or two"
	$(PY) -m pip install -qq --disable-pip-version-check --constraint requirements.lock $(TORCH)
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --requirement requirements.lock
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: setup ## Fine-tune the embedded model across several clients, offline, in minutes
	$(VENV)/bin/cgfedllm run configs/quickstart.toml

test: setup ## Run the tests
	$(PY) -m pytest -m "not slow"

test-all: setup ## Run all tests, the slow ones too
	$(PY) -m pytest -m ""

check: setup ## Check formatting, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: setup ## Format the code and apply safe lint fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The lock is the installed closure: raise versions in the environment with pip, see the tests
# pass, then freeze. torch (and what CUDA builds of it bring) and pip itself stay out, as do
# extras: start from an environment that `make setup` made.
lock: setup ## Write requirements.lock anew from the environment
	@{ sed -n '/^#/p' requirements.lock; \
	   $(PY) -m pip freeze --all --exclude-editable \
	     | grep -v -i -E '^(torch|pip|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)(==| @)' \
	     | sed -E 's/^(uvloop==.*)/\1 ; sys_platform != "win32"/'; \
	 } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## Remove the environment and everything built (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
