# The same commands serve people and CI. Each sets up what it needs in .venv, once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
SUDO := $(shell [ $$(id -u) = 0 ] || echo sudo)
CORE := paths tree init merge optim stack describe sharding kernel_axes dropout certify transforms frameworks \
	forward others_get_wrong battery forward_properties
VERSIONED := stack sharding transforms frameworks forward forward_properties

.PHONY: run test slow oracle real oldest bench browser docs tpu mutants check clean

run: .venv/.run  ## fine-tune the embedded model on the embedded task
	$(BIN)/lora-jax train --output out/demo --overwrite

test: .venv/.test  ## everything but the live comparisons and the long tail, compiled quickly
	$(PYTEST)

slow: .venv/.test  ## the long tail: more of the same, on more cases
	$(PYTEST) --slow
	$(PYTEST) --optimized

oracle: .venv/.oracle  ## the comparisons with torch and PEFT, live
	$(PYTEST) --oracle

real: .venv/.oracle  ## published weights against their references: make real DATA=DIR, see tests/test_real_weights.py
	$(BIN)/python -m pytest --real $(DATA) tests/test_real_weights.py

bench: .venv/.oracle .venv-qwix/.ready  ## a step beside PEFT's and others', in turn: make bench DEVICE=gpu where torch and jax see one
	$(BIN)/python benchmarks/step.py --device $(or $(DEVICE),cpu)

browser: .venv/.browser  ## reports and the site, opened in headless Chromium
	$(BIN)/python -m pytest --browser tests/test_report_browser.py tests/test_site_browser.py

docs: .venv/.docs  ## the site, in build/site; any warning is an error
	$(BIN)/python -m doctest docs/site/hooks.py docs/site/griffe_extension.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tpu: .venv/.tpu  ## plans for TPU topologies and a step beside one by hand, compiled with libtpu; no TPU is needed
	$(BIN)/python -m pytest --tpu tests/test_plan_tpu.py tests/test_step_cost.py

mutants: .venv/.test  ## faults put into the core one at a time, each of which a test must find; 5 minutes on two cores
	$(BIN)/python tests/mutate.py

# Of the battery's checks, those that a version of JAX can break; gradients, vmap and loops meet in the properties.
# Of the long tail, what meets meshes, frameworks and loops.
oldest: .venv-oldest/.ready  ## the core's tests with the oldest JAX and flax that it supports
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv-oldest/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(CORE:%=tests/test_%.py) \
		-k "not test_battery[ or -axes] or -output] or -dtype] or -settings] or -materializes]"
	.venv-oldest/bin/python -m pytest -q --slow -n $(JOBS) --dist worksteal $(VERSIONED:%=tests/test_%.py)

check: .venv/.check  ## style, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)" pyright --verifytypes lora_jax --ignoreexternal | \
		awk '/error:/ { print } /^Type completeness score/ { print; score = $$NF + 0 } END { exit score < 99 }'
	$(BIN)/python -m pytest -q tests/test_layering.py

clean:
	rm -rf .venv .venv-oldest .venv-qwix

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.run: $(INPUTS) | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[all]'
	touch $@

.venv/.test: $(INPUTS) | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[test]'
	touch $@ .venv/.run

.venv/.check: $(INPUTS) | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[test,dev]'
	touch $@ .venv/.run .venv/.test

# torch on its own first: peft would be content with any version of it.
.venv/.oracle: constraints-oracle.txt .venv/.test
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -c constraints-oracle.txt peft bitsandbytes trl
	touch $@

# Chromium comes from the system's packages, by their Debian names.
.venv/.browser: .venv/.test
	$(PIP) -c constraints.txt -e '.[test,browser,docs]'
	command -v chromium && command -v chromedriver || \
		($(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends chromium chromium-driver)
	touch $@

.venv/.docs: $(INPUTS) | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

# In a folder of its own: where JAX finds libtpu it looks for a TPU.
.venv/.tpu: .venv/.test
	$(PIP) -c constraints.txt --no-deps --target .venv/tpu 'libtpu==0.0.42.*'
	touch $@

# What the core and its tests need, and no more: models and command line are tested with the newest versions only.
# Equinox refuses JAX 0.7.0 and 0.7.1, and flax 0.12 all below 0.7.1. Without Equinox, the forward's tests pass with 0.7.1.
.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		jax flax optax pytest pytest-xdist hypothesis dm-haiku equinox
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# Apart from .venv, so that no test and no other contender of the benchmark depends on what Qwix needs.
.venv-qwix/.ready: $(INPUTS)
	$(PYTHON) -m venv .venv-qwix
	.venv-qwix/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf]' qwix==0.1.8
	touch $@
