# What CI and a newcomer both call. Every target sets up what it needs; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := 0.13.8
# What `make package-lambda` packs: references to models of a repository, for a stage of serverless.yml.
REPOSITORY ?= build/flights/models
MODELS     ?= flight-delay
STAGE      ?= prod
# A rollout.toml that it renders for CodeDeploy, if any.
POLICY     ?=
# What `make load` asks, how, and further options of `python -m loadtests`.
TARGET     ?= serve
SHAPE      ?= steps
OPTIONS    ?=
LOCKS  := requirements/dev.txt requirements/models.txt
STAMP  := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
export RAY_USAGE_STATS_ENABLED := 0
export UV_LINK_MODE := copy
unexport PYTHONDONTWRITEBYTECODE  # where a machine sets it, each of the many processes would compile all that it imports

.PHONY: help setup demo demo-canary test test-slow lint bench load package-lambda lock clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv and install the locked requirements (idempotent)

$(STAMP): $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Triform needs CPython 3.11 to 3.13, this is " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps -r requirements/models.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup ## build the flights example, score 336,776 flights, ask a local Lambda and Ray Serve for 1,000, print how they agree
	@$(BIN)/python -m examples.demo

demo-canary: setup ## roll version 2 of the example out on Ray Serve under load, then a bad version 3: promoted, and rolled back
	@$(BIN)/python -m examples.canary

test: setup ## the test suite without its slow part
	$(PYTEST) -m "not slow and not gpu" --numprocesses 2 --dist loadgroup

test-slow: setup ## the full counts of the fault and property tests
	$(PYTEST) -m "slow and not gpu"

lint: setup ## ruff, mypy --strict, import contracts, and that every test can be imported
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) --collect-only -qqq >/dev/null || $(PYTEST) --collect-only -qqq

bench: setup ## run the benchmarks; each prints its tables (a few hours; Spark needs Java)
	@for name in \
	  predict protocols scoring lambda_cold_start lambda_warm canary \
	  "batch --plot docs/img" \
	  "batch --flat --plot docs/img" \
	  "batch --profile" \
	  "batch --only flights --rows 20000000 --peers raw,triform" \
	  "serving --rounds 3 --seconds 4 --plot docs/img" \
	  "serving --rows --rounds 2 --plot docs/img" \
	  "serving --batching --rounds 5 --seconds 8" \
	  "serving --open-loop --only triform,ray-asgi,litserve,mosec --rounds 2 --seconds 3" \
	  "serving --scaling --rounds 3 --seconds 4" \
	  "canary_serve --rounds 60 --breaks 10" \
	  "rollout --to docs/img" rollout_users; \
	do $(BIN)/python -m benchmarks.$$name; done

load: setup ## load on TARGET=serve|lambda by SHAPE=steps|spike|soak|diurnal|burst, answers checked; more in OPTIONS; a report in build/load
	@$(BIN)/python -m loadtests --target $(TARGET) --shape $(SHAPE) $(OPTIONS)

package-lambda: setup ## build the Lambda layers (MODELS of REPOSITORY) and render the template of STAGE, without AWS
	@test "$(REPOSITORY)" != build/flights/models || test -d $(REPOSITORY) || $(BIN)/python -m examples.flights.build --to build/flights
	@$(BIN)/python -m infra.layers build --each --repository $(REPOSITORY) $(addprefix --model ,$(MODELS))
	@$(if $(POLICY),$(BIN)/python -m infra.rollout render $(POLICY) --to build/rollout.json)
	@$(BIN)/python -m infra.serverless package --stage $(STAGE) $(if $(POLICY),--param policy=build/rollout.json)

lock: setup ## rewrite requirements/*.txt from pyproject.toml
	@compile="$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate"; \
	$$compile --extra cpu pyproject.toml -o requirements/runtime.txt; \
	$$compile --extra cpu --extra s3 --extra ray --extra redis --extra report pyproject.toml -o requirements/batch.txt; \
	$$compile --extra cpu --extra cli --extra s3 --extra lambda --extra ray --extra dev pyproject.toml -o requirements/dev.txt; \
	$$compile --extra gpu --extra s3 --extra ray --extra redis -c requirements/dev.txt pyproject.toml requirements/gpu.in -o requirements/gpu.txt; \
	$$compile --extra cpu --extra s3 --extra lambda -c requirements/dev.txt pyproject.toml requirements/lambda.in -o requirements/lambda.txt; \
	$$compile --no-deps requirements/models.in -o requirements/models.txt; \
	for peer in requirements/peers/*.in; do $$compile $$peer -o $${peer%.in}.txt; done

clean: ## remove what the targets made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
