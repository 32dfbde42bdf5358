# Every command that a person types. Bare `make` lists them.

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV ?= .venv
KIND ?= sd15
TRAINER ?= builtin
MODEL ?=
DATASET ?=
OUT ?= demo-out

# The vocabulary of CLIP's tokenizers is taken from this wheel; the package itself is never imported.
VOCABULARY := open_clip_torch==3.3.0
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo test lint format clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  e.g. make demo KIND=sdxl, make demo MODEL=model.safetensors DATASET=pictures/"

env: $(READY) ## Make the Python environment in .venv

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[train,demo,test]'
	$(VENV)/bin/pip install --quiet --no-deps $(VOCABULARY)
	$(VENV)/bin/python -m kohya.tokenizers
	@touch $@

demo: $(READY) ## Run the main job on this machine: S3 in, LoRA out [KIND TRAINER MODEL DATASET OUT]
	$(VENV)/bin/python -m demo --kind $(KIND) --trainer $(TRAINER) --out $(OUT) \
		$(if $(MODEL),--model $(MODEL)) $(if $(DATASET),--dataset $(DATASET))

test: $(READY) ## Run all tests [TEST_S3_ENDPOINT: an S3 server to use instead of moto's]
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal

lint: $(READY) ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## Put the code into the style that lint checks
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(OUT) *.egg-info .mypy_cache .pytest_cache .ruff_cache
