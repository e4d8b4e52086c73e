# The verbs of chord-rl. Each sets up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := models/smollm2-135m
DEMO := deploy/recipes/demo.toml
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: help demo test test-deploy check fix pitfalls chaos soak bench compare

help:
	@echo "make demo   train SmolLM2-135M to add and subtract, from nothing to a summary"
	@echo "make test   every test but those of deploy/"
	@echo "make test-deploy  the units, manifests, dashboards and alerts of deploy/, by the tools that operators use; the report in a browser"
	@echo "make check  format, lint and types"
	@echo "make fix    format and mend what can be mended"
	@echo "make pitfalls  plant every known mistake of CHORD implementations in a copy; the tests must notice each"
	@echo "make chaos  kill, stop, cut off, starve and damage real runs for about half an hour; nothing may be lost"
	@echo "make soak   an hour of light faults and hostile connections; memory must not grow"
	@echo "make bench  every hot path against what you would use instead, in one run (PART=learner: that part alone)"
	@echo "make compare  the methods against each other on a real model, run by run (MINUTES=150: end by then; COMMIT=1: commit each; stop and go on at will)"

demo: $(READY) $(MODEL)/config.json
	$(BIN)/chord-expert import reasoning_gym --num-rows 1000 --config $(DEMO)
	$(BIN)/chord-local --fresh --config $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest

test-deploy: $(READY) .tools/.ready
	$(BIN)/python -m pytest tests/deploy

.tools/.ready: $(wildcard tests/deploy/tools.sh tests/deploy/debian.txt tests/deploy/requirements.txt tests/deploy/package.json)
	@echo "installing the tools of make test-deploy (a few minutes, once)"
	@tests/deploy/tools.sh .tools
	@touch .tools/.ready

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

fix: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

pitfalls: $(READY)
	$(BIN)/python -m tests.pitfalls

chaos: $(READY)
	$(BIN)/python -m tests.chaos

soak: $(READY)
	$(BIN)/python -m tests.chaos.soak

bench: $(VENV)/.bench $(MODEL)/config.json
	$(BIN)/python -m tests.bench $(PART)

compare: $(READY) $(MODEL)/config.json
	$(BIN)/python -m tests.compare --minutes $(or $(MINUTES),0) $(if $(COMMIT),--commit)

# The peers that `make bench` compares with.
$(VENV)/.bench: $(READY)
	@$(BIN)/python -m pip install --quiet --editable ".[bench]"
	@touch $(VENV)/.bench

$(MODEL)/config.json: | $(READY)
	$(BIN)/python deploy/models/smollm2.py $(MODEL)

# torch first and exactly: where a CPU build lies at hand it is taken, and the ranges below are satisfied by it.
$(READY): pyproject.toml
	@echo "setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet torch==2.13.0
	@$(BIN)/python -m pip install --quiet --editable ".[$(EXTRA),demo,dev]" || { \
		echo "vLLM does not install here: going on without it, actors will use the transformers engine"; \
		$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"; }
	@$(BIN)/python -W ignore -c "import torchvision" 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(READY)
