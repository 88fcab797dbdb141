# make demo      build, install into .venv, run a worker without any server and call it from Celery
# make test      everything that CI runs; installs what it needs
# make build     the wheel, built and installed into .venv        (PROFILE=release for an optimised one)
# make lint      rustfmt, clippy, ruff, mypy                      make format   rewrites what rustfmt and ruff can
# make docs      rewrites the pages that are made from tables
# make bench     drains a queue with celeriac and with Celery's own worker
# make bench-async, bench-livez, bench-ready     see the first line of each script in benches/

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROFILE ?= dev
CARGO ?= cargo

# Celery's own integration suite against a worker command; lies beside the checkout, not in it.
CONFORMANCE ?= ../shared/conformance/run-integration
BENCH ?= ../shared/bench

# Of pytest: most of them wait most of the time, three for Celery's own suite.
PROCESSES ?= 5

# What a change of must build the wheel anew.
SOURCES := Cargo.toml Cargo.lock pyproject.toml $(shell find src python -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test build lint format docs bench bench-async clean test-rust test-python servers

demo: build
	$(BIN)/python demo/run.py --worker "$(or $(WORKER),celeriac)"

# Cheap checks first; pytest last, so that its closing line ends the run.
test: servers
	$(MAKE) lint
	$(MAKE) test-rust
	$(MAKE) test-python

test-rust: $(BIN)/.test-requirements
	PYTHON="$(abspath $(BIN))/python" PATH="$$PATH:/usr/sbin" $(CARGO) test --locked

test-python: build $(BIN)/.test-requirements
	CONFORMANCE="$(CONFORMANCE)" $(BIN)/python -m pytest -n $(PROCESSES) --maxschedchunk=1 $(PYTEST)

servers:
	tests/apt-install redis-server rabbitmq-server memcached chromium chromedriver

lint: $(BIN)/.test-requirements
	$(CARGO) fmt --all --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --all-targets --features python -- -D warnings

format: $(BIN)/.test-requirements
	$(CARGO) fmt --all
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: build
	$(BIN)/python -c 'from celeriac import _core; print(_core.options_reference(), end="")' > docs/options.md
	$(BIN)/python -c 'from celeriac import settings; print(settings.reference(), end="")' > docs/settings.md
	CELERIAC_WRITE_DOCS=1 $(CARGO) test --locked --lib in_the_docs

build: $(BIN)/.installed-$(PROFILE)

$(BIN)/.installed-$(PROFILE): $(SOURCES) | $(BIN)/maturin
	rm -rf target/wheels-$(PROFILE) $(BIN)/.installed-*
	$(BIN)/maturin build --locked --profile $(PROFILE) --interpreter $(BIN)/python --out target/wheels-$(PROFILE)
	$(BIN)/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps target/wheels-$(PROFILE)/celeriac-*.whl
	$(BIN)/pip install --quiet --disable-pip-version-check 'celery[redis]>=5.4,<5.8'
	touch $@

$(BIN)/python:
	PYTHON="$(PYTHON)" tests/apt-install cc python-venv
	$(PYTHON) -m venv $(VENV)

$(BIN)/maturin: | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check 'maturin>=1.9.4,<2'
	touch $@

$(BIN)/.test-requirements: tests/requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# Uses the servers on their default ports, as the scripts in $(BENCH) do: BROKER=redis or amqp, RUNS pairs in turn.
bench:
	@test -f $(BENCH)/drain.py || { echo "$(BENCH)/drain.py is absent: set BENCH" >&2; exit 1; }
	$(MAKE) build PROFILE=release
	$(BIN)/pip install --quiet --disable-pip-version-check hiredis psutil pika
	for run in $$(seq $(or $(RUNS),3)); do for worker in celery:$(or $(N_CELERY),4000) celeriac:$(or $(N),30000); do \
	  $(BIN)/python $(BENCH)/drain.py --broker $(or $(BROKER),redis) --label $${worker%:*} --n $${worker#*:} \
	    --worker "$(abspath $(BIN))/$${worker%:*} -A perfapp worker -c 2 -l error" || exit 1; \
	done; done

bench-%: benches/%.py
	$(MAKE) build PROFILE=release
	$(BIN)/python $< $(ARGS)

bench-async: bench-async_tasks

clean:
	$(CARGO) clean
	rm -rf $(VENV)
