# `make demo` and `make test` each work alone on a fresh machine with Python 3.11 or newer.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench docs clean

demo: $(VENV)/.demo
	@mkdir -p demo
	$(BIN)/compactcli analyze examples/digits-resnet20.pt
	$(BIN)/compactcli compress examples/digits-resnet20.pt --method hinge --ratio 0.5 --data digits -o demo/small.safetensors
	$(BIN)/compactcli finetune demo/small.safetensors --data digits --teacher examples/digits-resnet20.pt --epochs 8 --lr 0.01 -o demo/tuned.safetensors
	$(BIN)/compactcli report demo/tuned.safetensors --baseline examples/digits-resnet20.pt --data digits

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks campaign --resume

docs: $(VENV)/.dev
	$(BIN)/python docs/make.py

clean:
	rm -rf $(VENV) demo build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[digits]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@
