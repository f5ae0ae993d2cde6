# What people run. Every target sets up what it needs: `make test` in a fresh clone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: setup demo test test-mpich check bench clean

setup: $(STAMP)

# A new environment whenever its description changed; the stamp comes last, so an interrupted set-up starts again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or later is needed; choose one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || $(MAKE) --no-print-directory python-venv
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Debian and Ubuntu keep venv in a package of its own.
.PHONY: python-venv
python-venv:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq python3-venv; \
	else \
		echo "error: $(PYTHON) has no venv; as root: apt-get install python3-venv" >&2; exit 1; \
	fi

demo: setup
	$(BIN)/python launch/demo.py

test: setup
	$(BIN)/python -m pytest -n auto

# The transport and the backend on MPICH: its wheel and Open MPI's put files of the same names into one environment.
test-mpich: .venv-mpich/.stamp
	.venv-mpich/bin/python -m pytest -m mpi

.venv-mpich/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-mpich
	.venv-mpich/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mpi,train]' \
		mpich hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup
	@for name in select gather wire quality; do echo "== $$name"; $(BIN)/sparcomm bench $$name || exit 1; done

clean:
	rm -rf $(VENV) .venv-mpich build dist runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
