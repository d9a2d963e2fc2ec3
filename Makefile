# make train | make test | make lint      each sets up .venv first if need be
#   make train ARGS="model=small trainer.max_seconds=600"
#   make test ARGS="-k cortex"         make test ARGS="-m slow" runs the long ones, left out otherwise
#   PYTHON=/path/to/python3.12 make train     to choose the interpreter

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
READY_DEV := .venv/ready-dev
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test lint clean
.DELETE_ON_ERROR:

train: $(READY)
	$(BIN)/python scripts/train.py experiment=quick $(ARGS)

test: $(READY_DEV)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found; install one or set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

$(READY_DEV): $(READY)
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
