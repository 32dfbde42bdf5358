# Every command that a person types. Bare `make` lists them.

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV ?= .venv
KIND ?= sd15
TRAINER ?= builtin
MODEL ?=
DATASET ?=
OUT ?=
FOLDER ?=
PORT ?=

IMAGE ?= sagemaker-kohya
CUDA ?= 13
VARIANT ?= cuda$(CUDA)
TAG ?= $(VERSION)-$(VARIANT)
CUDA_COMPAT ?= none
BASE_IMAGE ?= debian:bookworm-slim
SD_SCRIPTS ?= pinned
SD_SCRIPTS_DIR ?= $(wildcard .sd-scripts/checkout)
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
WHEELS ?=
TAGGER ?=
BUILD_FLAGS ?=
GPUS ?= $(if $(filter cpu,$(VARIANT)),,all)
ARGS ?=
PIP_CONF ?= $(wildcard /etc/pip.conf)
CERTIFICATES ?= $(wildcard /etc/ssl/certs/ca-certificates.crt)

VERSION = $(shell awk -F '"' '/^__version__/ {print $$2}' entrypoint/__init__.py)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude '*')
LYCORIS := lycoris-lora==4.1.3
SD_SCRIPTS_TAG = $(shell awk -F '"' '/^TAG = / {print $$2}' kohya/sd_scripts.py)
SD_SCRIPTS_COMMIT = $(shell awk -F '"' '/^COMMIT = / {print $$2}' kohya/sd_scripts.py)
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo stand-in image image-cpu run shell push size lock full-size checks sd-scripts options readme test mutate soak test-image test-sd-scripts test-gpu lint format clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  e.g. make demo KIND=sdxl, make demo MODEL=model.safetensors DATASET=pictures/"

env: $(READY) ## Make the Python environment in .venv

$(READY): pyproject.toml docker/vocabulary.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[train,caption,demo,test]'
	$(VENV)/bin/pip install --quiet --no-deps --require-hashes --requirement docker/vocabulary.txt
	$(VENV)/bin/python -m kohya.tokenizers
	@touch $@

demo: $(READY) ## Run the main job on this machine: S3 in, LoRA out [KIND TRAINER MODEL DATASET OUT]
	$(VENV)/bin/python -m demo --kind $(KIND) --trainer $(TRAINER) $(if $(OUT),--out "$(OUT)") \
		$(if $(MODEL),--model "$(MODEL)") $(if $(DATASET),--dataset "$(DATASET)")

stand-in: $(READY) ## Stand in for AWS on this machine, SageMaker included, until Ctrl-C [PORT FOLDER]
	@exec $(VENV)/bin/python -m demo.stand_in $(if $(PORT),--port $(PORT)) $(if $(FOLDER),--folder "$(FOLDER)")

# Contexts and secrets are passed where there are any: docker/Dockerfile says what each is for. With attestations
# an image becomes an index, which SageMaker does not take.
build = docker image inspect $(BASE_IMAGE) >/dev/null 2>&1 || docker pull $(BASE_IMAGE); \
	DOCKER_BUILDKIT=1 BUILDX_NO_DEFAULT_ATTESTATIONS=1 docker build --platform linux/amd64 \
	--file docker/Dockerfile $(BUILD_FLAGS) \
	--build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg SD_SCRIPTS=$(SD_SCRIPTS) \
	$(if $(filter-out none,$(SD_SCRIPTS)),--build-arg SD_SCRIPTS_COMMIT=$(SD_SCRIPTS_COMMIT)) \
	--build-arg BASE_DIGEST=$$(docker image inspect \
		--format '{{with .RepoDigests}}{{index . 0}}{{else}}{{.Id}}{{end}}' $(BASE_IMAGE) | sed 's/.*@//') \
	--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
	$(if $(WHEELS),--build-context wheels=$(WHEELS)) $(if $(TAGGER),--build-context tagger=$(TAGGER)) \
	$(if $(PIP_CONF),--secret id=pipconf$(comma)src=$(PIP_CONF)) \
	$(if $(CERTIFICATES),--secret id=ca$(comma)src=$(CERTIFICATES))
comma := ,

image: ## Build the image [CUDA=12 CUDA_COMPAT=nvidia SD_SCRIPTS_DIR SD_SCRIPTS=none TAGGER WHEELS BASE_IMAGE BUILD_FLAGS]
	$(build) --build-arg VARIANT=$(VARIANT) --build-arg CUDA_COMPAT=$(CUDA_COMPAT) \
		$(if $(SD_SCRIPTS_DIR),--build-context sd-scripts=$(SD_SCRIPTS_DIR)) \
		--tag $(IMAGE):$(TAG) .

image-cpu: VARIANT = cpu
image-cpu: SD_SCRIPTS = none
image-cpu: ## Build the small image that trains with the built-in trainer on a CPU [TORCH TORCH_INDEX WHEELS]
	$(build) --build-arg VARIANT=$(VARIANT) --build-arg GPUS=void --build-arg TORCH=$(TORCH) \
		--build-arg TORCH_INDEX=$(TORCH_INDEX) --tag $(IMAGE):$(TAG) .

# exec: a stop of make reaches the job. ML, RUN_FLAGS and REPOSITORY are in the environment when they are typed.
run = exec env IMAGE='$(IMAGE):$(TAG)' GPUS='$(GPUS)' docker/run

run: ## Run a job in the image, on the folder ML [ARGS CUDA VARIANT=cpu ML GPUS RUN_FLAGS TAG]
	@$(run) train $(ARGS)

shell: ## Open a shell in the image, set up as for a job [CUDA VARIANT=cpu ML GPUS RUN_FLAGS TAG]
	@$(run) bash

push: ## Push the image to ECR [CUDA VARIANT REPOSITORY TAG]
	@IMAGE='$(IMAGE):$(TAG)' docker/push

size: $(READY) ## Show what the image weighs, by layer and by part [CUDA VARIANT TAG]
	@docker save $(IMAGE):$(TAG) | $(VENV)/bin/python docker/size.py

lock: $(READY) ## Renew the locks of the image's packages [UPGRADE=1 CHECK=1]
	docker/lock $(if $(UPGRADE),--upgrade) $(if $(CHECK),--check)

full-size: $(READY) ## Measure the job on a full-size model, beside sd-scripts typed by hand [KIND FOLDER]
	$(VENV)/bin/python -m benchmarks.full_size --kind $(KIND) $(if $(FOLDER),--folder "$(FOLDER)")

checks: $(READY) ## Measure what the checks of a data set cost, beside the least that they could
	$(VENV)/bin/python -m benchmarks.checks

sd-scripts: .sd-scripts/.ready ## Get the pinned sd-scripts, with an environment of its own, into .sd-scripts

.sd-scripts/.ready: kohya/sd_scripts.py
	rm -rf .sd-scripts
	git clone --quiet --depth 1 --branch $(SD_SCRIPTS_TAG) https://github.com/kohya-ss/sd-scripts .sd-scripts/checkout
	test "$$(git -C .sd-scripts/checkout rev-parse HEAD)" = $(SD_SCRIPTS_COMMIT)
	$(PYTHON) -m venv .sd-scripts/venv
	cd .sd-scripts/checkout && sed s/^opencv-python=/opencv-python-headless=/ requirements.txt \
		| ../venv/bin/pip install --quiet torch torchvision $(LYCORIS) -r /dev/stdin
	@touch $@

options: $(READY) ## Write kohya/options.json and tests/data from the pinned sd-scripts
	set -e; set -- $$($(VENV)/bin/python -c 'from kohya import sd_scripts as s; f = s.find(); print(f.python, f.folder)'); \
	"$$1" -m kohya.options "$$2" >$(VENV)/options.json; mv $(VENV)/options.json kohya/options.json; \
	"$$1" -m tests.shapes "$$2" tests/data >/dev/null; \
	"$$1" -m tests.buckets "$$2" 1 24 | tail -n 1 >$(VENV)/facts.json; mv $(VENV)/facts.json tests/data/sd_scripts_facts.json

readme: $(READY) ## Write into README.md what is made from the code
	$(VENV)/bin/python -m tests.readme

mutate: $(READY) ## Delete each rule in turn, and show that a test notices [ONLY=kohya/rules.py]
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.mutate_rules $(ONLY)

soak: $(READY) ## Kill, starve and lie to jobs, and see what becomes of them [SEED N ONLY=kills TRAINER SD_SCRIPTS_DIR]
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.faults.soak $(if $(SEED),--seed $(SEED)) $(if $(N),--jobs $(N)) \
		$(if $(ONLY),--only $(ONLY)) $(if $(filter command% env%,$(origin TRAINER)),--trainer $(TRAINER))

test-sd-scripts: $(READY) ## Run the tests that need sd-scripts [SD_SCRIPTS_DIR SD_SCRIPTS_PYTHON]
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal tests/sd_scripts

test-image: $(READY) ## Test the image with both trainers and both kinds [CUDA VARIANT TAG GPU=1]
	TEST_IMAGE=$(IMAGE):$(TAG) $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal tests/image

test-gpu: $(READY) ## Run the tests that need a GPU and sd-scripts, and time the presets [SD_SCRIPTS_DIR SD_SCRIPTS_PYTHON]
	@nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null \
		|| { echo "make test-gpu needs an NVIDIA GPU, and nvidia-smi finds none here"; exit 1; }
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/gpu

test: $(READY) ## Run all tests but those that need sd-scripts, Docker or a GPU [TEST_S3_ENDPOINT: an S3 server to use instead of moto's]
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal \
		--ignore tests/sd_scripts --ignore tests/gpu --ignore tests/image

lint: $(READY) ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## Put the code into the style that lint checks
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove what the other targets made
	rm -rf $(VENV) .sd-scripts demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache
