# make          install into .venv, editable, with the kernels built into the tree
# make demo     train, evaluate and report on rendered glyphs (a few minutes, no data set, no GPU)
# make test     lint and every test
# make lint     ruff, mypy, clang-format
# make bench    all measurements on a CPU, to benchmarks/results (6 minutes, on an idle machine)
# make gpu      for machines with a GPU, torch and nvcc where nothing can be installed: build in place
#               with $(PYTHON), test every backend, measure; each part has a time limit, 9 minutes in
#               all
# make gpu-quick   the same in 3 minutes: build, tests, headline figures
# make clean    remove build products (make distclean: the virtual environment too)
#
# PYTHON=python3.12 chooses the interpreter of a new .venv; ARGS="..." goes to the demo, pytest or
# the benchmarks.
# NIVMF_CUDA and NIVMF_REQUIRE_EXT are explained in setup.py.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
EVERYTHING := '.[train,test,dev]'
PIP := $(RUN) -m pip install
KERNELS := $(wildcard csrc/*)
REQUIREMENTS := pyproject.toml $(CONSTRAINTS)
SWITCHES := NIVMF_CUDA=$(NIVMF_CUDA) NIVMF_REQUIRE_EXT=$(NIVMF_REQUIRE_EXT) $(TORCH_CUDA_ARCH_LIST)
FAIL = { echo "make: $(1)" >&2; exit 1; }

.DELETE_ON_ERROR:
.PHONY: install demo test lint bench gpu gpu-quick clean distclean compiler FORCE

install: $(INSTALLED)

demo: $(INSTALLED)
	$(RUN) -m train --preset glyphs $(ARGS)

test: compiler lint
	$(RUN) -m pytest $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(KERNELS) $(wildcard tests/*.cpp)

bench: $(INSTALLED)
	$(RUN) -m benchmarks all $(ARGS)

gpu:
	$(PYTHON) -m benchmarks gpu $(ARGS)

gpu-quick:
	$(PYTHON) -m benchmarks gpu --quick $(ARGS)

# torch comes first, because the kernels are compiled against the installed torch; without build
# isolation setuptools is the pinned one too. If only kernels have changed, they are just rebuilt.
RESOLVE = $(filter $(REQUIREMENTS),$?)
$(INSTALLED): $(RUN) $(VENV)/.switches $(KERNELS) setup.py $(REQUIREMENTS)
	$(if $(RESOLVE),$(PIP) -c $(CONSTRAINTS) setuptools torch)
	$(PIP) --no-build-isolation --editable \
	  $(if $(RESOLVE),$(EVERYTHING) -c $(CONSTRAINTS),. --no-deps --quiet)
	$(RUN) -m nivmf_fast
	@touch $@

# Rewritten only when a build switch differs from that of the last build.
$(VENV)/.switches: FORCE | $(RUN)
	@echo '$(SWITCHES)' | cmp -s - $@ || echo '$(SWITCHES)' > $@

$(RUN):
	@command -v $(PYTHON) > /dev/null \
	  || $(call FAIL,there is no $(PYTHON); try: sudo apt install python3 python3-venv)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || $(call FAIL,$(PYTHON) is older than 3.10; try: make PYTHON=python3.12)
	@if $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null; then $(PYTHON) -m venv $(VENV); \
	elif command -v virtualenv > /dev/null; then virtualenv --quiet -p $(PYTHON) $(VENV); \
	elif command -v uv > /dev/null; then uv venv --quiet --seed -p $(PYTHON) $(VENV); \
	else $(call FAIL,$(PYTHON) has no venv module; try: sudo apt install python3-venv); fi

# The library works without a compiler, but some tests compile device code for the host.
compiler: | $(RUN)
	@command -v $(firstword $(CXX)) > /dev/null \
	  || $(call FAIL,the tests need a C++ compiler; try: sudo apt install g++)
	@test -f "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
	  || $(call FAIL,the tests need Python.h; try: sudo apt install python3-dev)

clean:
	rm -rf build *.egg-info nivmf_fast/_C_*.so nivmf_fast/_build_info.json $(INSTALLED)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
