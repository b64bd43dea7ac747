# Each of `make demo` and `make test` does all of its own set-up on a fresh Debian with Python 3.11.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE  # demo and tests start hundreds of processes: each would compile the package
INSTALL = $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check fuzz fuzz-long test-arm test-brokers test-chaos test-hostile test-numpy test-wheel mosquitto gcc rabbitmq-server nats-server nftables nodejs npm clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## a federation on this machine, from nothing to a report; ARGS='--rounds 50' adds options
	$(BIN)/meerkat demo $(ARGS)

test: $(VENV)/.test mosquitto gcc nftables nodejs npm check ## all checks and tests; ARGS='-k mask' adds options of pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal $(ARGS)

check: $(VENV)/.test ## format, lint, types, floors
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-arm: $(VENV)/.test ## golden vectors and a node without PyTorch on aarch64, under qemu-user elsewhere
	scripts/test-arm

test-brokers: $(VENV)/.test rabbitmq-server nats-server ## the tests that need a broker, on RabbitMQ and on NATS; ARGS as above
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 200 --broker nats $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 200 --broker rabbitmq $(ARGS)

test-chaos: $(VENV)/.test mosquitto gcc ## every shipped fault drill, plain and buffered, and 200 SIGKILLs: an hour; ARGS='--seconds 30'
	scripts/test-chaos $(ARGS)

test-hostile: $(VENV)/.test mosquitto ## what one hostile node of eight costs, a minute for each attack; ARGS='--attacks H6'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.hostile_traffic $(ARGS)

test-numpy: $(VENV)/.test ## golden vectors on NumPy 2.0 and the newest
	scripts/test-numpy

test-wheel: $(VENV)/.test mosquitto ## every command of the wheel, without extras, in an empty environment
	scripts/test-wheel

fuzz: $(VENV)/.test ## 2,000 damaged files of each kind that users write or bring
	MEERKAT_FUZZ=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/fuzz $(ARGS)

fuzz-long: $(VENV)/.test mosquitto nodejs npm ## 2,000,000 damaged inputs for decoders, 300,000 messages to a running federation: an hour
	MEERKAT_FUZZ=2000 MEERKAT_FUZZ_INPUTS=2000000 MEERKAT_FUZZ_MESSAGES=300000 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 tests/fuzz tests/protocol/test_live_fuzz.py $(ARGS)

clean: ## remove everything that the targets above made, but not runs/
	rm -rf $(VENV) .arm build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from, and is written last: an interrupted installation starts again.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV) (the first time this takes minutes: PyTorch is large) …'
	@$(INSTALL) -e '.[model,embedded]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV), with the tools for tests (the first time this takes minutes: PyTorch is large) …'
	@$(INSTALL) -e '.[model,onnx,bundle,lora,datasets,embedded,dev]'
	@touch $(VENV)/.demo $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null \
		|| { echo "make: $(PYTHON) is not installed; install Python 3.11 or newer, or name one: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $$($(PYTHON) --version) is too old; name Python 3.11 or newer: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || scripts/apt-install python3-venv
	@$(PYTHON) -m venv --clear $(VENV)

mosquitto rabbitmq-server nats-server npm:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v $@ >/dev/null || scripts/apt-install $@

nftables:  # for a test that skips where it may not use it
	@[ "$$(id -u)" != 0 ] || PATH="$$PATH:/usr/sbin" command -v nft >/dev/null || scripts/apt-install $@

nodejs:
	@command -v node >/dev/null || scripts/apt-install $@

gcc:
	@command -v cc >/dev/null || { scripts/apt-install gcc && scripts/apt-install libc6-dev; }
