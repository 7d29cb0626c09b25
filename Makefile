# Two commands are enough: `make dev` runs the whole thing, `make test` tests it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := deploy/requirements-dev.lock
CLIENTS := tests/compat/clients
NODE := $(CLIENTS)/node
NODE_STAMP := $(NODE)/node_modules/.package-lock.json

.PHONY: dev test compat check docs clean

dev: $(STAMP)
	$(BIN)/meshproxy dev

test: $(STAMP) $(NODE_STAMP)
	MESHPROXY_SIMULATION_S=$${MESHPROXY_SIMULATION_S-60} $(BIN)/python -m pytest -n 2 --dist loadfile

# The tests that run in a minute, for a second interpreter: `make quick PYTHON=python3.13 VENV=.venv-3.13`.
.PHONY: quick
QUICK_TESTS := $(wildcard $(addprefix tests/,faults gateway http1 ledger openai policy server telemetry upstream simulator test_*.py))
quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK_TESTS)

# The clients that applications use, against a gateway of their own. `test` has those that install in seconds; this has all,
# where the compilers of Go, Java (Maven) and Rust are.
compat: $(STAMP) $(NODE_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,compat]'
	@if command -v go >/dev/null; then cd $(CLIENTS)/go && go build -o driver .; else echo "no go"; fi
	@if command -v mvn >/dev/null; then cd $(CLIENTS)/java && mvn -q -B package; else echo "no mvn"; fi
	@if command -v cargo >/dev/null; then cd $(CLIENTS)/rust && cargo build --quiet; else echo "no cargo"; fi
	MESHPROXY_COMPAT=1 $(BIN)/python -m pytest tests/compat -rs

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# meshproxy beside nginx, HAProxy and others: see benchmarks/README.md. `make bench ARGS=--quick` takes a minute.
.PHONY: bench
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

# Each target of tests/fuzz for a while, under atheris if that is installed. `make fuzz ARGS="--seconds 3600"`
.PHONY: fuzz
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py $(ARGS)

# Half an hour of everything at once, faults included: is anything left over? `make soak ARGS="--seconds 240"`
.PHONY: soak
soak: $(STAMP)
	$(BIN)/python -m tests.soak.run $(ARGS)

# The whole gateway in a deterministic world: docs/simulation.md. `make simulate ARGS="--seeds 1000"`, `ARGS="--replay SEED"`
.PHONY: simulate
simulate: $(STAMP)
	$(BIN)/python -m simulation $(ARGS)

# policy/, http1/ and openai/ changed in every small way: which changes does no test notice? Then `.venv/bin/mutmut results`.
.PHONY: mutants
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	$(BIN)/mutmut run $(ARGS)

# docs/configuration.md, from the typed settings.
docs: $(STAMP)
	$(BIN)/python scripts/configuration_doc.py

# What is installed here, by CI and in the image, to the hash. After a change of pyproject.toml: `make lock`; for newer versions of
# all: `make lock ARGS=--upgrade`.
.PHONY: lock
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
lock:
	[ -x $(BIN)/uv ] || $(MAKE) $(STAMP)
	$(COMPILE) $(ARGS) --extra dev --output-file $(LOCK) pyproject.toml >/dev/null
	echo 'setuptools>=77' | $(COMPILE) --extra otel --constraint $(LOCK) --output-file deploy/requirements.lock pyproject.toml - >/dev/null

$(STAMP): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(STAMP)

$(NODE_STAMP): $(NODE)/package.json $(NODE)/package-lock.json
	@if command -v npm >/dev/null; then cd $(NODE) && npm ci --loglevel=error; \
	else echo "npm is not installed: the tests of Node clients will be skipped"; fi

clean:
	rm -rf .venv .venv-* $(NODE)/node_modules $(CLIENTS)/go/driver $(CLIENTS)/java/target $(CLIENTS)/rust/target build dist *.egg-info
