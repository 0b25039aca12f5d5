# Two commands do all set-up: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
MODELS := smollm2-135m minilm-l6 dinov2-s whisper-tiny-en
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check models compat clean

demo: $(STAMP)
	$(BIN)/interp models install smollm2-135m
	$(BIN)/interp demo --out runs/demo

test: $(STAMP) models check
	$(BIN)/python -m pytest -n 2 --dist loadfile

models: $(STAMP)
	$(BIN)/interp models install $(MODELS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The oldest transformers that pyproject.toml allows, or TRANSFORMERS=5.24.0 for another, in a venv of its own.
FLOOR := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
TRANSFORMERS ?= $(FLOOR).0
OLD := .venv-compat/$(TRANSFORMERS)
CORE := $(addprefix tests/test_,attention.py lens.py generate.py edits.py padding.py heads.py attribution_rollout.py tracing_sweep.py grids.py families.py)
# On 5.15 the image processors of these two need torchvision.
CORE_BUT := $(if $(filter $(FLOOR).0,$(TRANSFORMERS)),-k "not idefics3 and not smolvlm")

compat:
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(OLD)/bin/python -m pip install -q "transformers==$(TRANSFORMERS)" -e . pytest pytest-timeout hypothesis beartype networkx
	$(OLD)/bin/python -m pytest -q -p no:cacheprovider $(CORE_BUT) $(CORE)

# torch comes first and pinned: a looser range would pull the CUDA builds onto machines that have no GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PIP) install -q -c constraints.txt -e ".[all,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-compat runs site .pytest_cache .ruff_cache
