# `make help` lists the targets. Each installs into .venv first when that is missing or older than what it is made from.

PYTHON ?= python3
FAISS ?= cpu
TARGET ?= gpu
IMAGE ?= onethreshold
# The project's version and Ray's, as the manifests say it.
TAG = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-ray$(shell sed -n 's/^ray==//p' constraints.txt)
BIN := .venv/bin
ENV := .venv/installed-$(FAISS)

.DEFAULT_GOAL := help
.PHONY: help search serve ui test test-slow check format bench image lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "Options of a command go into ARGS:  make search ARGS='--budget full'"

search: $(ENV) ## Search TCM's margins on the built-in data; the best model becomes the champion
	$(BIN)/python -m tune.search $(ARGS)

serve: $(ENV) ## Serve the champion on http://127.0.0.1:8000
	$(BIN)/python -m serve.app $(ARGS)

ui: $(ENV) ## Browse runs, figures and models on http://127.0.0.1:5000
	$(BIN)/python -m cluster.tracking ui $(ARGS)

test: $(ENV) ## Run the tests (minutes)
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-slow: $(ENV) ## Run the long tests: kill, load, composition
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(ENV) ## Lint, formatting, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(ENV) ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(ENV) ## Run the benchmarks; each prints a table
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

image: ## Build the image of k8s/ with Docker; TARGET=cpu for a cluster without GPUs, IMAGE=registry/name for yours
	docker build --target $(TARGET) --tag $(IMAGE):$(TAG) .

lock: ## Remake constraints.txt from the newest releases that pyproject.toml allows
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet '.[cpu,test,dev]'
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude onethreshold > .venv-lock/all
	@# faiss-cpu and faiss-gpu share one folder: what only a machine with GPUs has is added after.
	.venv-lock/bin/python -m pip install --quiet --constraint .venv-lock/all '.[gpu]'
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude onethreshold >> .venv-lock/all
	{ echo '# The exact set that was tested. Remade by `make lock`.'; sort --ignore-case --unique .venv-lock/all; } > constraints.txt
	rm -rf .venv-lock build *.egg-info

clean: ## Remove the environment, caches and everything under runs/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache runs build *.egg-info

$(ENV): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# faiss-cpu and faiss-gpu share one folder: one of them at a time.
	@rm -f .venv/installed-* && $(BIN)/python -m pip uninstall --quiet --yes faiss-$(if $(filter cpu,$(FAISS)),gpu,cpu) 2>/dev/null
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(FAISS),test,dev]'
	@touch $@
