# Needs git, make and Python 3.11 or newer. Every target installs what it needs into .venv first (once).
#   make demo PYTHON=python3.12       use another Python        make demo ARGS="--port 8000"      pass options on
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export GRADIO_ANALYTICS_ENABLED ?= False

.DEFAULT_GOAL := help
.PHONY: help install demo tour bench test lint programs constraints clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## open the gallery in a browser
	@$(BIN)/mmoe demo $(ARGS)

tour: $(STAMP)  ## walk through the zoo in a few minutes
	@$(BIN)/mmoe tour $(ARGS)

bench: $(STAMP)  ## measure the models on this machine
	@$(BIN)/mmoe bench $(ARGS)

test: $(STAMP)  ## run the tests; ARGS="-m slow" runs the slow ones
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile \
	--no-loadscope-reorder $(ARGS)

lint: $(STAMP)  ## check format, style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

programs:  ## install Debian's chromium and espeak-ng, which tests need, where they are missing
	@missing=; \
	for name in chromium chromium-browser google-chrome; do command -v $$name && break; done >/dev/null || missing=chromium; \
	command -v espeak-ng >/dev/null || missing="$$missing espeak-ng"; \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "error: no apt-get; install by hand: $$missing" >&2; exit 1; }; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$sudo apt-get update -qq && \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing

install: $(STAMP)  ## install everything into .venv

# The stamp is written last, so an interrupted install is taken up again. A package that was being unpacked when the
# install was killed has no INSTALLER file yet; without its .dist-info pip sees that it has to be installed again.
# Byte code is compiled on all cores, which pip does on one; some packages have files that are no Python 3.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "error: '$(PYTHON)' is missing or older than Python 3.11; try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	{ echo "error: '$(PYTHON)' has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@[ -e $(STAMP) ] || echo "Installing into $(VENV): once, some minutes, 3 GB to download and 7 GB on the disk."
	@if [ -d $(VENV) ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@[ -d $(VENV) ] || $(PYTHON) -m venv $(VENV)
	@for info in $(VENV)/lib/python*/site-packages/*.dist-info; do \
	[ -e "$$info/INSTALLER" ] || rm -rf "$$info"; done
	@$(BIN)/python -m pip install $(if $(wildcard $(STAMP)),-q) --no-compile -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(STAMP)

constraints: $(STAMP)  ## write the releases in .venv to constraints.txt
	@{ echo "# Releases that the tests run with, made by 'make constraints' from what is in .venv."; \
	echo "# To move to newer ones: .venv/bin/pip install --upgrade PACKAGE, make test lint, make constraints."; \
	echo "# Use it with pip's -c option. The variable PIP_CONSTRAINT would replace a constraint of the system."; \
	$(BIN)/python -m pip freeze --exclude-editable; } > constraints.new
	@mv constraints.new constraints.txt
	@touch $(STAMP)

clean:  ## remove caches and builds; distclean removes .venv too
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache constraints.new
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
