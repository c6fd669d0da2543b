# `make demo` and `make test` do all the set-up they need; docs/install.md tells how.

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=

PY = $(or $(PYTHON),$(VENV)/bin/python)

# $(call setup,EXTRAS): any Python from 3.9 on can run the set-up, which then picks the one to use; a name on
# PATH may not run. EXTRAS are those of setup.py that PYTHON must have; VENV gets them all.
setup = @for p in python3 python3.11 python3.12 python3.13 python3.10 python3.9 $(PYTHON); do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null && exec "$$p" \
	    tools/setup_environment.py --extras $(1) $(if $(PYTHON),--python '$(PYTHON)',--venv '$(VENV)'); \
	done; echo 'set-up: no Python from 3.9 to 3.13 runs here; install one' >&2; exit 1

# A user's environment does not get this project installed: it runs from here.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: help setup demo test test-fast clean

help:
	@echo 'make demo    the main job end to end'
	@echo 'make test    every test, with line coverage'
	@echo 'make test-fast  the quick tests: no trainings, processes, browser, export or GPU'
	@echo 'make setup   only the set-up, which demo and test begin with'
	@echo 'make clean   removes what builds and tests leave; environments and results stay'
	@echo 'VENV=FOLDER  environment to make and use, with tested versions (default: .venv)'
	@echo 'PYTHON=EXE   an environment that you have, instead: only what is missing there is installed'

setup:
	$(call setup,dev export report)

demo:
	$(call setup,export report)
	$(PY) demo/run.py

PYTEST = $(PY) -m pytest tests -n auto --dist loadfile

test test-fast: export OMP_NUM_THREADS = 1
test:
	$(call setup,dev export report)
	$(PYTEST) --cov=qmimic_d2 --cov-report=term-missing:skip-covered --cov-fail-under=95 $(PYTEST_ARGS)

test-fast:
	$(call setup,dev export report)
	$(PYTEST) -m 'not slow and not ddp and not browser and not export and not gpu' $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
