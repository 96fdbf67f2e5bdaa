# Everything runs in .venv. `make up` sets up and makes the main job; `make test` runs all checks of the code.
# TORCH_INDEX=<url of a wheel index> takes torch from there, for example PyTorch's CPU index on a machine without a GPU.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
TORCH   = torch>=2.11,<=2.13.0
SOURCES = pyproject.toml setup.py $(wildcard src/glasklar/*/cpu/*.[ch]pp)

.PHONY: setup dev up test test-slow test-spark test-page lint bench clean

setup: $(VENV)/.installed
dev: $(VENV)/.dev

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable .
	@touch $@

# The C++ libraries are taken from build/native, where setup.py keeps them: only what is missing is installed.
$(VENV)/.dev: $(VENV)/.installed
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

up: setup
	$(BIN)/glasklar up

test: dev
	$(BIN)/python -m pytest

test-slow: dev
	$(BIN)/python -m pytest -m slow

# `spark` made from nothing, then verified, and stretches of its training done again in another process, from sources made
# again: drawn by this commit, the one with the largest change of weights among them. REPLAYED=8 does all of it again.
REPLAYED ?= 3
test-spark: export GLASKLAR_HOME = $(CURDIR)/build/spark-home
test-spark: dev
	rm -rf $(GLASKLAR_HOME)
	$(BIN)/glasklar train spark
	$(BIN)/glasklar verify spark
	$(BIN)/glasklar replay spark --beacon "$$(git rev-parse HEAD)" -n $(REPLAYED) --rebuild-data
	$(BIN)/glasklar verify spark

# The page in a real browser; screenshots are left in build/page. Needs Debian's chromium.
test-page: dev
	$(BIN)/python -m pytest -m browser tests/page

lint: dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: dev
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python bench/training.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
