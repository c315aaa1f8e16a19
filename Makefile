# `make quickstart` and `make test` need Python 3.11+, make and a C compiler; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

# Where torch alone comes from, if not from pip's own index: https://download.pytorch.org/whl/cpu has builds without CUDA.
TORCH_INDEX_URL ?=

.PHONY: help install quickstart test test-gpu lint docs clean
help:
	@echo "make quickstart   train a small NeoBERT on this machine (5 minutes on 2 cores)"
	@echo "make test         run the whole test suite, on a machine with a GPU its tests, too"
	@echo "make test-gpu     run the tests that need a GPU"
	@echo "make lint         ruff, the import rules and the types of the public interface"
	@echo "make docs         build the documentation into site/"
	@echo "make clean        remove .venv, site/ and the quickstart's run"
	@echo
	@echo "Without a GPU, add TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu unless your package index serves CPU builds."

install: .venv/.installed

# Reinstalled only when one of these files changed.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX_URL),$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --index-url $(TORCH_INDEX_URL) torch)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/tune-style run mlm_pretrain --config neobert/quickstart output_dir=$(RUN)
	$(BIN)/tune-style fill-mask $(RUN) "Raises an [MASK] if the file does not exist." \
		"Return [MASK] if the object is a directory, False otherwise." "If the argument is not given, it [MASK] to None."
	$(BIN)/tune-style plot $(RUN) -o $(RUN)/loss.png

# One process per core, each with one thread: more threads than cores make torch slower, not faster. None sees a GPU.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal tests
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(MAKE) test-gpu; fi

# In one process, which has the GPU's memory for itself.
test-gpu: install
	$(BIN)/python -m pytest -q -m gpu tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

clean:
	rm -rf .venv site $(RUN)
