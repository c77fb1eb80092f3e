# From a bare clone, with Python 3.11+ and make: `make demo` trains, `make test` checks. Both install first, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Pinned once, in constraints.txt. torch goes first and alone, so that nothing later can choose another build of it.
TORCH  := $(shell grep '^torch==' constraints.txt)
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Strict: mkdocs.yml says that a warning is an error. Not with --quiet, under which MkDocs 1.6 counts none. The variable
# leaves out its maker's note about a successor.
MKDOCS := out=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build 2>&1) || { echo "$$out"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format docs bench bench-constrained bench-family bench-mopo bench-sharding audit clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP)  ## Create .venv and install the pinned dependencies (about two minutes, once).

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'Python 3.11 or newer is needed; name it with: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@test -x $(BIN)/python || { echo '[1/3] creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo '[2/3] installing $(TORCH)'
	@$(PIP) '$(TORCH)'
	@echo '[3/3] installing moa-lightning and its tools'
	@$(PIP) -e '.[test,dev,docs]'
	@touch $@

demo: install  ## Align a small policy in five ways: one table, and the picture runs/demo/front.png.
	@$(BIN)/moa demo

test: lint  ## Check style, types and imports, then run all tests.
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

lint: install  ## Check style, types, the direction of imports and the documentation.
	@echo 'ruff'; $(BIN)/ruff check --quiet .
	@echo 'ruff format'; $(BIN)/ruff format --quiet --check .
	@echo 'mypy'; $(BIN)/mypy --no-error-summary
	@echo 'import-linter'; out=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$out"; exit 1; }
	@echo 'mkdocs'; $(MKDOCS)

format: install  ## Format the code and mend what ruff can mend.
	@$(BIN)/ruff check --quiet --fix . && $(BIN)/ruff format .

bench: install  ## Time the combiners: one solve of each, over N objectives and policy sizes.
	@$(BIN)/python -m bench.combiners.combine

bench-constrained: install  ## Where constrained training ends beside the best fixed weight; 25 runs of about 3 minutes, kept in runs/constrained.
	@$(BIN)/python -m bench.constrained --keep runs/constrained

bench-family: install  ## Every combiner: what it adds to a step, and where it ends on toy problems with known fronts.
	@$(BIN)/python -m bench.combiners.family
	@$(BIN)/python -m bench.fronts

bench-mopo: install  ## MOPO against exact fronts, trained policies, ablations; noisy and missing labels; the cost of its dual step.
	@$(BIN)/python -m bench.mopo
	@$(BIN)/python -m bench.mopo --votes
	@$(BIN)/python -m bench.mopo --cost

bench-sharding: install  ## Memory of GPT-2 XL and Llama 7B on 1 to 64 processes, without a GPU; the cost of sampling from a sharded policy.
	@$(BIN)/python -m bench.sharding
	@$(BIN)/python -m bench.sharding.generation

docs: install  ## Build the documentation site in site/; a warning is an error.
	@$(MKDOCS)

# In an environment of its own, since its dependencies are not pinned here. Strict: what cannot be looked up is a failure.
audit:  ## Look the pinned versions up among published advisories (needs a network).
	@$(PYTHON) -m venv .cache/audit
	@.cache/audit/bin/python -m pip install -qq --disable-pip-version-check 'pip-audit==2.10.1'
	@.cache/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean:  ## Remove the environment, the caches and what was built (runs/ stays).
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
