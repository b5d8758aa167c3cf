# Every target sets itself up on a fresh machine: Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PROMPT ?= A woman says "good morning"
LOOP_DIR ?= runs/loop
BANK ?= runs/bank

.PHONY: help setup demo loop finetune evaluate weights bench test check fix clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## / - /'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "avdiff needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev,eval]' -c constraints.txt
	@touch $@

setup: $(STAMP)  ## create .venv and install avdiff into it

demo: $(STAMP)  ## speak a sentence with the weights in the package -> demo.mp4
	$(BIN)/avdiff generate '$(PROMPT)' -o demo.mp4 --seed 0

loop: $(STAMP)  ## the whole road in minutes: mini-bank -> codecs -> training -> mp4
	rm -rf $(LOOP_DIR)
	$(BIN)/python samples/loop.py --folder $(LOOP_DIR)

finetune: $(STAMP)  ## a new look and sound by LoRA in minutes, measured before and after -> runs/finetune
	rm -rf runs/finetune
	$(BIN)/python samples/finetune.py --folder runs/finetune

evaluate: $(STAMP)  ## the presenter on all held-out prompts beside its ceilings, an hour: make evaluate BANK=speech bank
	$(BIN)/python samples/evaluate.py --bank $(BANK) --folder runs/evaluation

weights: $(STAMP)  ## rebuild all that ships, hours: make weights BANK=folder of a speech bank
	$(BIN)/python samples/weights.py --bank $(BANK) --folder runs/weights

bench: $(STAMP)  ## ratios and speeds, measured side by side -> bench.json (10 GiB of free disk, no other work meanwhile)
	$(BIN)/python samples/bench/run.py --output bench.json

test: $(STAMP)  ## all tests but the slow ones, on CPU, offline
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

check: $(STAMP)  ## lint, types (on an installed copy) and layout
	$(BIN)/ruff check .
	rm -rf build/typed
	$(BIN)/python -m pip install --quiet --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p avdiff
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_layout.py

fix: $(STAMP)  ## let the linter mend what it can
	$(BIN)/ruff check --fix .

clean:  ## remove what building leaves behind (not .venv, not runs)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
