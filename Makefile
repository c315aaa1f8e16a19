# `make quickstart` and `make test` need Python 3.11+, make and a C compiler; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

.PHONY: help install quickstart test lint clean
help:
	@echo "make quickstart   train a small NeoBERT on this machine (about 5 minutes on 2 cores)"
	@echo "make test         run the whole test suite"
	@echo "make lint         ruff and the import rules"
	@echo "make clean        remove .venv and the quickstart's run"

install: .venv/.installed

# Installed again only when what it is made from changed.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/tune-style run mlm_pretrain --config neobert/quickstart output_dir=$(RUN)
	$(BIN)/tune-style fill-mask $(RUN) "The [MASK] of a function is the value that it returns." \
		"Raises an [MASK] if the file does not exist." "Return a list of the [MASK] in the dictionary."
	$(BIN)/tune-style plot $(RUN) -o $(RUN)/loss.png

# One process per core, each with one thread: more threads than cores make torch slower, not faster.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf .venv $(RUN)
