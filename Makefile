# `make demo` runs the whole job on a CPU; `make test` runs the tests. Both make .venv themselves
# when it is missing or setup.py has changed; a second run starts at once.
#
#   make demo PYTHON=python3.12              another interpreter (3.10 or newer)
#   make test TORCH_SPEC=torch==2.14.1       another PyTorch
#   make test TORCH_INDEX=                   PyTorch from pip's own index only
#   make test-oldest                         the oldest versions that setup.py allows, in .venv-oldest

PYTHON      ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Read only by the recipes that install: asking the driver takes a moment.
HAS_GPU      = $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo yes)
OLDEST_TORCH = $(shell $(PYTHON) tests/tools/floors.py torch)
TORCH_SPEC  ?= $(if $(HAS_GPU),torch>=$(OLDEST_TORCH),torch==2.13.0)

VENV := .venv
BIN  := $(VENV)/bin
PIP   = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-oldest test-avx2 lint bench bench-trainer aot aot-3.6 count memory gpu-check \
        chaos families families-quick clean

demo: $(VENV)/.demo  # one thread: the model is so small that a second one is mostly waited for
	OMP_NUM_THREADS=1 $(BIN)/redi run recipes/demo.yaml

# One worker a core and one thread a worker: many small tests, none of which fills two threads.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# The same tests with the oldest versions that setup.py allows, which is where they are read from.
test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest OLDEST=yes TORCH_SPEC=torch==$(OLDEST_TORCH)

# What depends on the CPU's kernels, with those of AVX2: numpy's matmuls (the interpreter's), torch's
# own, and oneDNN's. On a machine that has nothing wider the same tests as ever, by the same code.
test-avx2: $(VENV)/.dev
	OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n auto --dist loadfile tests/triton_interpreted \
	  tests/redi_kernels/test_fast.py tests/redi_kernels/test_numerics.py \
	  tests/redi_kernels/test_bitwise.py tests/redi_kernels/test_losses.py

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# On a quiet machine: half an hour on 2 cores with all peers (pip install liger-kernel cut-cross-entropy).
bench: $(VENV)/.dev
	@mkdir -p runs
	$(BIN)/python -m pytest bench --benchmark-json runs/bench.json
	$(BIN)/python bench/loss_table.py --tokens 2048 8192
	$(BIN)/python bench/loss_table.py --memory --report docs/benchmarks.md

# The whole trainer against TRL's, where a step's time goes, and its growth with the tokens.
bench-trainer: $(VENV)/.dev
	$(BIN)/python bench/trainer_table.py --write docs/trainer.md
	$(BIN)/python bench/profile_step.py
	$(BIN)/python bench/scaling.py --write docs/scaling.png

# The Triton kernels without a GPU: what they compile to, what they cost, what they keep in memory.
# `count` and `memory` show the peers that are installed: cut-cross-entropy, liger-kernel, trl.
aot: $(VENV)/.dev
	$(BIN)/python bench/aot.py --write docs/aot.md

aot-3.6: $(VENV)/.dev
	$(PIP) --upgrade --target $(VENV)-triton-3.6 triton==3.6.0
	PYTHONPATH=$(VENV)-triton-3.6 $(BIN)/python bench/aot.py

count: $(VENV)/.dev  # ACTIVATIONS=runs/activations.pt adds a table on real states (bench/activations.py)
	$(BIN)/python bench/count.py $(if $(ACTIVATIONS),--activations $(ACTIVATIONS)) --write docs/count.md

memory: $(VENV)/.dev
	$(BIN)/python bench/memory.py --write docs/memory.md

gpu-check: $(VENV)/.dev
	$(BIN)/python bench/gpu_check.py

chaos: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python bench/chaos.py

# A tiny model of every causal-LM family of transformers: trained right, refused, or not buildable.
families: $(VENV)/.dev
	$(BIN)/python bench/families.py --write docs/models.md

families-quick: $(VENV)/.dev
	$(BIN)/python bench/families.py --quick

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# --- installing: one stamp per set of extras, redone when setup.py changes

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	@# A CPU needs PyTorch's own index: on Linux the default build is CUDA's, gigabytes of it. It is
	@# asked once with a short limit, since pip would retry an unreachable index for every package.
	@if [ -z "$(HAS_GPU)" ] && $(BIN)/python -c \
	  'from urllib.request import urlopen; urlopen("$(TORCH_INDEX)/torch/", timeout=8)' 2>/dev/null; \
	then echo '==> $(TORCH_SPEC) from $(TORCH_INDEX)'; \
	  $(PIP) '$(TORCH_SPEC)' --extra-index-url $(TORCH_INDEX); \
	else echo "==> $(TORCH_SPEC) from pip's own index"; $(PIP) '$(TORCH_SPEC)'; fi
	@touch $@

$(VENV)/.demo: setup.py $(VENV)/.torch
	@echo '==> redi with the extras data, plot$(if $(HAS_GPU),$(comma) gpu)'
	@$(PIP) -e '.[data,plot$(if $(HAS_GPU),$(comma)gpu)]'
	@touch $@

$(VENV)/.dev: setup.py $(VENV)/.torch
	@echo '==> redi with the extra dev (what the tests need)'
	@$(BIN)/python tests/tools/floors.py > $(VENV)/oldest.txt
	@$(PIP) $(if $(OLDEST),--constraint $(VENV)/oldest.txt) -e '.[dev]'
	@touch $@ $(VENV)/.demo

comma := ,
