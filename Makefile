# Everything a clone needs: `make help` lists the targets.

PYTHON ?= python3
# An extra package index for torch and torchvision, see README: PyPI's wheels bring CUDA along.
TORCH_INDEX ?=
# `make image-check`: the service of docker-compose.yml, and another compose file with what has to
# differ on this machine.
SERVICE ?= cpu
MORE ?=
# ONCE=1 makes `make demo` end by itself after the queries.
ONCE ?=
# Processes of `make test`. More than two cores have: much of the time is spent waiting. Files run in
# their order, since xdist's own begins with those of many tests and ends with the longest.
WORKERS ?= 3
# Where `make bench` writes its results, and which benchmarks it runs.
RESULTS ?= benchmarks/results
BENCHES ?= rescore recall scale start enroll embed serve

VENV := .venv
BIN := $(VENV)/bin
# An environment is made once, and again when what it installs has changed. The one for
# development holds all that the one for running holds.
RUNNABLE := $(VENV)/runnable
DEVELOPMENT := $(VENV)/development

# The constraints also hold for what builds the package, under pip's old and new name for that.
INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs openapi bench crash soak scale-check gpu-check image-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNNABLE) ## start the service with the demo gallery, query it, serve until Ctrl-C (ONCE=1: end)
	$(BIN)/cmt demo $(if $(ONCE),--once)

# Each of several processes would start a thread of NumPy's for every core, and they wait for turns.
test: APART = $(addprefix tests/training/export/,test_export.py test_int8.py)
test: export OPENBLAS_NUM_THREADS = 1
test: $(DEVELOPMENT) ## run the tests
	@# Apart, at the same time, each of these in a process of its own: where ONNX Runtime or NNCF had run together with
	@# OpenVINO and all else, a later test ended in a segmentation fault. A process that dies ends the run: xdist waits
	@# for ever for the one that it starts instead.
	for file in $(APART); do $(BIN)/pytest $$file || exit; done & apart=$$!; \
	$(BIN)/pytest --numprocesses $(WORKERS) --max-worker-restart 0 --dist loadfile --no-loadscope-reorder \
		$(addprefix --ignore ,$(APART)); rest=$$?; \
	wait $$apart && exit $$rest

lint: $(DEVELOPMENT) ## check style, formatting, types, layers, container files and issue forms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
		.github/ISSUE_TEMPLATE/bug_report.yml .github/ISSUE_TEMPLATE/feature_request.yml
	@# Not every platform has a wheel of hadolint; CI's has.
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint docker/Dockerfile; fi

format: $(DEVELOPMENT) ## format the code and order its imports
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .

docs: $(DEVELOPMENT) ## build the documentation's site into build/site; whatever is broken in it fails
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

openapi: $(DEVELOPMENT) ## write the service's OpenAPI document to docs/openapi.json
	$(BIN)/python scripts/openapi.py

bench: $(DEVELOPMENT) ## run the benchmarks and write their results to benchmarks/results
	@mkdir -p $(RESULTS)
	$(foreach name,$(BENCHES),$(BIN)/cmt bench $(name) --json $(RESULTS)/$(name).json \
		$(if $(filter recall scale serve,$(name)),--plot $(RESULTS)/$(name).png) &&) true

crash: $(DEVELOPMENT) ## kill the gallery and the service a hundred times each; what they acknowledged must hold
	@mkdir -p $(RESULTS)
	$(BIN)/python -m tests.service.crash.run --rounds 100 --json $(RESULTS)/crash.json
	$(BIN)/python -m tests.service.crash.run --rounds 100 --json $(RESULTS)/crash-service.json \
		--subject service --checkpoint examples/compact.safetensors

soak: $(DEVELOPMENT) ## ten minutes of all kinds of load at once on a service that is held to its promises
	@mkdir -p $(RESULTS)
	$(BIN)/python -m tests.service.soak.run --minutes 10 --json $(RESULTS)/soak.json \
		--checkpoint examples/compact.safetensors

scale-check: $(DEVELOPMENT) ## kill nodes of a Ray cluster under load, and let Ray Serve start networks
	@mkdir -p $(RESULTS)
	CMT_KILLS=$(RESULTS)/ray-kills.json $(BIN)/pytest -s -p no:cacheprovider \
		tests/service/scale/long_kills.py tests/service/scale/long_ray_serve.py

gpu-check: ## on a machine with a GPU: its tests and benchmarks, in eight minutes, without a network
	@# Such a machine may have no environment of ours: its own Python has torch then.
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m scripts.gpu_check --out $(RESULTS)/gpu

image-check: $(RUNNABLE) ## build the image for CPUs, run it by docker-compose.yml, and hold it to that
	$(BIN)/python -m scripts.image_check --service $(SERVICE) $(addprefix --file ,$(MORE)) --out $(RESULTS)

clean: ## remove the environment and what tools have cached
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; \
		sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed and \
	$(PYTHON) is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUNNABLE): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[cpu]'
	@touch $@

$(DEVELOPMENT): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[cpu,train,dev]'
	@touch $(RUNNABLE) $@
