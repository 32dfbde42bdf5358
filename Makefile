# Every command that a person types. Bare `make` lists them.

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV ?= .venv
KIND ?= sd15
TRAINER ?= builtin
MODEL ?=
DATASET ?=
OUT ?=
FOLDER ?=

# The vocabulary of CLIP's tokenizers is taken from this wheel; the package itself is never imported.
VOCABULARY := open_clip_torch==3.3.0
SD_SCRIPTS := .sd-scripts
LYCORIS := lycoris-lora==4.1.3
SD_SCRIPTS_TAG = $(shell awk -F '"' '/^TAG = / {print $$2}' kohya/sd_scripts.py)
SD_SCRIPTS_COMMIT = $(shell awk -F '"' '/^COMMIT = / {print $$2}' kohya/sd_scripts.py)
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo full-size sd-scripts options test test-sd-scripts test-gpu lint format clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  e.g. make demo KIND=sdxl, make demo MODEL=model.safetensors DATASET=pictures/"

env: $(READY) ## Make the Python environment in .venv

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[train,demo,test]'
	$(VENV)/bin/pip install --quiet --no-deps $(VOCABULARY)
	$(VENV)/bin/python -m kohya.tokenizers
	@touch $@

demo: $(READY) ## Run the main job on this machine: S3 in, LoRA out [KIND TRAINER MODEL DATASET OUT]
	$(VENV)/bin/python -m demo --kind $(KIND) --trainer $(TRAINER) $(if $(OUT),--out "$(OUT)") \
		$(if $(MODEL),--model "$(MODEL)") $(if $(DATASET),--dataset "$(DATASET)")

full-size: $(READY) ## Measure the job on a full-size model, beside sd-scripts typed by hand [KIND FOLDER]
	$(VENV)/bin/python -m benchmarks.full_size --kind $(KIND) $(if $(FOLDER),--folder "$(FOLDER)")

sd-scripts: $(SD_SCRIPTS)/.ready ## Get the pinned sd-scripts, with an environment of its own, into .sd-scripts

$(SD_SCRIPTS)/.ready: kohya/sd_scripts.py
	rm -rf $(SD_SCRIPTS)
	git clone --quiet --depth 1 --branch $(SD_SCRIPTS_TAG) https://github.com/kohya-ss/sd-scripts $(SD_SCRIPTS)/checkout
	test "$$(git -C $(SD_SCRIPTS)/checkout rev-parse HEAD)" = $(SD_SCRIPTS_COMMIT)
	$(PYTHON) -m venv $(SD_SCRIPTS)/venv
	cd $(SD_SCRIPTS)/checkout && sed s/^opencv-python=/opencv-python-headless=/ requirements.txt \
		| ../venv/bin/pip install --quiet torch torchvision $(LYCORIS) -r /dev/stdin
	@touch $@

options: $(READY) ## Write kohya/options.json and tests/data from the pinned sd-scripts
	set -e; set -- $$($(VENV)/bin/python -c 'from kohya import sd_scripts as s; f = s.find(); print(f.python, f.folder)'); \
	"$$1" -m kohya.options "$$2" >$(VENV)/options.json; mv $(VENV)/options.json kohya/options.json; \
	"$$1" -m tests.shapes "$$2" tests/data >/dev/null

test-sd-scripts: $(READY) ## Run the tests that need sd-scripts [SD_SCRIPTS_DIR SD_SCRIPTS_PYTHON]
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal tests/sd_scripts

test-gpu: $(READY) ## Run the tests that need a GPU and sd-scripts, and time the presets [SD_SCRIPTS_DIR SD_SCRIPTS_PYTHON]
	@nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null \
		|| { echo "make test-gpu needs an NVIDIA GPU, and nvidia-smi finds none here"; exit 1; }
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/gpu

test: $(READY) ## Run all tests [TEST_S3_ENDPOINT: an S3 server to use instead of moto's]
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal \
		--ignore tests/sd_scripts --ignore tests/gpu

lint: $(READY) ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## Put the code into the style that lint checks
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(SD_SCRIPTS) demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache
