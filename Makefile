# Two commands do all set-up: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
MODELS := smollm2-135m minilm-l6 dinov2-s whisper-tiny-en
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check models clean

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

# torch comes first and pinned: a looser range would pull the CUDA builds onto machines that have no GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PIP) install -q -c constraints.txt -e ".[all,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache
