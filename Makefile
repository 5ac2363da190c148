# Two commands do all the set-up: `make demo` draws a story, `make test` checks everything.
# Each needs Python 3.11 or later, pip, make, gcc and g++.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
ROOMS := .venv/rooms

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/storyadapter-trt build
	rm -rf demo-out
	$(BIN)/storyadapter-trt run --iterations 3 --seed 7 --out demo-out

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Types are checked under the import names: ROOMS holds links to the folders that setup.py maps.
lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf $(ROOMS)
	mkdir -p $(ROOMS)/storyadapter
	ln -s $(addprefix $(CURDIR)/,$(wildcard storyadapter/*) bench engine export kernels) $(ROOMS)/storyadapter
	$(BIN)/mypy

# The constraints hold the exact versions that were tested, torch's among them.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-out
