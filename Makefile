# `make demo` and `make test` are all a fresh machine needs: both set up the same virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin/
INSTALLED = $(VENV)/.installed
OLDEST = $(VENV)/oldest
QUANTISED = $(VENV)/quantised

.PHONY: demo test test-newest test-oldest test-quantised lint clean

demo: $(INSTALLED)
	$(BIN)python examples/demo.py

# The first two keep one core busy each, so they run side by side.
test: $(OLDEST)/.installed $(QUANTISED)/.installed
	$(MAKE) --no-print-directory --jobs 2 lint test-quantised
	$(MAKE) --no-print-directory test-newest
	$(MAKE) --no-print-directory test-oldest

test-newest: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)python -m pytest -n 2 --dist worksteal

# A short run with the oldest supported transformers, which lies in a folder of its own before the newest.
test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)python -m pytest -n 2 --dist worksteal tests/test_hook.py tests/test_fallback.py tests/test_cache.py tests/test_stopping.py \
		tests/test_modeling.py tests/test_stats.py tests/test_memory.py

# Packages that transformers imports wherever it finds them, so they lie in a folder of their own too.
test-quantised: $(QUANTISED)/.installed
	PYTHONPATH=$(QUANTISED) $(BIN)python -m pytest tests/test_gpu_quantised.py

lint: $(INSTALLED)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)python -m pip install --quiet --constraint constraints.txt --editable '.[embedded,train,triton,dev]'
	touch $@

$(OLDEST)/.installed: $(INSTALLED) constraints-oldest.txt
	$(BIN)python -m pip install --quiet --upgrade --target $(OLDEST) --constraint constraints-oldest.txt transformers
	touch $@

$(QUANTISED)/.installed: $(INSTALLED)
	$(BIN)python -m pip install --quiet --no-deps --target $(QUANTISED) --constraint constraints.txt torchao bitsandbytes
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
