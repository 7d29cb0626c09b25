# Two commands are enough: `make dev` runs the whole thing, `make test` tests it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: dev test check clean

dev: $(STAMP)
	$(BIN)/meshproxy dev

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv build dist *.egg-info
