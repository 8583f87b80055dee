# The commands of theorykit. `make` alone lists them. The environment is made on the first use of any of them.
#
#   PRESET       size of the computation: smoke, quick (default), full; for learned_tasks also stars and paper
#   NAME         one figure, or one benchmark
#   PYTHON       interpreter for a new environment; by default the first of python3, python3.13, python3.12 and
#                python3.11 that is Python 3.11 to 3.13
#   VENV         folder of the environment
#   CONSTRAINTS  file of pinned versions; empty for the newest ones
#   WORKERS      processes of the tests
#
# Another Python with the newest packages, beside the pinned environment:
#   make test-fast PYTHON=python3.12 VENV=.venv-newest CONSTRAINTS=

# Set with = and not ?=, so that a NAME or PYTHON that happens to be in the shell's environment means nothing here.
PRESET = quick
NAME =
PYTHON =
VENV = .venv
CONSTRAINTS = constraints.txt
# Most of a test's time is compilation, on one core. Two processes cost 14% more processor time and nearly halve the
# wait on two cores; files are kept whole (loadfile), so that no function is compiled twice.
WORKERS = 2

PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
PYTEST = --numprocesses $(WORKERS) --dist loadfile
RESULTS = $${THEORYKIT_RESULTS:-results}

# Python that the project supports and that can make an environment (Debian packs venv's pip separately).
SUITABLE = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

.DEFAULT_GOAL := help
# One after the other, also under make -j: two processes would compute the same result twice.
.NOTPARALLEL:
.PHONY: help figures figure verify report test test-fast lint format notebooks bench constraints clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  options: PRESET=smoke|quick|full  NAME=...  PYTHON=python3.12  VENV=folder  CONSTRAINTS=file (empty: newest)'

figures: $(STAMP) ## compute every experiment, draw every figure, print the table of verdicts
	$(PY) regenerate.py --preset $(PRESET)

figure: $(STAMP) ## one figure, its experiment and its verdicts: make figure NAME=ntk_width
	@test -n '$(NAME)' || { echo 'name the figure: make figure NAME=ntk_width' >&2; exit 2; }
	$(PY) regenerate.py --preset $(PRESET) --names $(NAME)

verify: $(STAMP) ## print the table of verdicts; fails if one is not as expected
	$(PY) -m experiments verify --preset $(PRESET)

report: $(STAMP) ## everything on one page: paper_figures/output/report.html
	$(PY) -m experiments run --preset $(PRESET)
	$(PY) -m paper_figures.report --preset $(PRESET)

test: lint ## all tests: style, the library, every theorem at the smoke preset, the README, the notebooks
	$(PY) -m pytest $(PYTEST)

# Values do not depend on how hard the compiler tries, and most of the time is compilation of small programs. Without
# LLVM's expensive passes, by XLA's older loops and in one piece they take a fifth of the time with the pinned jaxlib. A flag that
# this version does not know would end every process, so each is tried first. The whole suite compiles as users do.
BRIEF = --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
test-fast: $(STAMP) ## the everyday part of the tests
	@for flag in $(BRIEF); do \
	    if XLA_FLAGS=$$flag $(PY) -c 'import jax; jax.numpy.zeros(1)' 2>/dev/null; then \
	        export XLA_FLAGS="$${XLA_FLAGS:+$$XLA_FLAGS }$$flag"; \
	    fi; \
	done; \
	export JAX_DISABLE_MOST_OPTIMIZATIONS=1; \
	echo "XLA_FLAGS='$$XLA_FLAGS' $(PY) -m pytest $(PYTEST) -m 'not slow'"; \
	$(PY) -m pytest $(PYTEST) -m 'not slow'

lint: $(STAMP) ## check style and layout of the code
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP) ## lay out the code and mend what can be mended automatically
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

notebooks: $(STAMP) ## execute the notebooks; the executed copies go to notebooks/output/
	@mkdir -p notebooks/output
	$(VENV)/bin/jupyter-execute --output=output/{notebook_name} notebooks/*.ipynb

bench: $(STAMP) ## time and memory against peers, as JSON; one of them: make bench NAME=ntk
	@for name in $(or $(NAME),imports ntk); do \
	    $(PY) -m benchmarks.$$name --preset $(PRESET) || exit 1; \
	done

constraints: $(STAMP) ## resolve the pinned versions again, for all supported Pythons
	$(VENV)/bin/uv pip compile --universal --python-version 3.11 --upgrade --extra infinite --extra dev \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet -o constraints.tmp pyproject.toml
	@{ echo '# The versions that the results were tested with. Written by `make constraints`.'; \
	    grep -v "== 'never'" constraints.tmp; } > constraints.txt
	@rm constraints.tmp

clean: ## remove figures, reports and what killed runs left behind; results stay
	rm -rf paper_figures/output notebooks/output .ruff_cache .hypothesis
	rm -rf "$(RESULTS)"/.partial-* "$(RESULTS)"/.new-*

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if ! $(PY) -c '$(SUITABLE)' >/dev/null 2>&1; then \
	    for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	        if "$$python" -c '$(SUITABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	    done; \
	    if test -z "$$found"; then \
	        echo 'No Python 3.11 to 3.13 with venv and ensurepip among: $(or $(PYTHON),python3 python3.13 python3.12 python3.11).' >&2; \
	        echo 'Install one (on Debian also its -venv package), or name it: make PYTHON=/path/to/python3.12 ...' >&2; \
	        exit 1; \
	    fi; \
	    echo "creating $(VENV) with $$("$$found" --version)"; \
	    "$$found" -m venv --clear $(VENV); \
	fi
	@echo 'installing theorykit and what it needs into $(VENV)'
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@$(VENV)/bin/uv pip install --quiet --python $(PY) $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS),--upgrade) \
	    --editable '.[infinite,dev]'
	@touch $@
