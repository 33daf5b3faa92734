# Everything runs in .venv, which is made on first use and brought up to date when the requirements change.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PACKAGES := dsv3_compile passes codegen model_def

.PHONY: demo test slow check format golden clean

demo: $(VENV)/.demo
	$(RUN) examples/compile_and_generate.py

# One thread per worker: the small matrices of the tests lose by being shared out.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

slow: $(VENV)/.dev
	$(RUN) -m pytest -m slow

check: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

golden: $(VENV)/.dev
	$(RUN) -m pytest -m golden --accept

clean:
	rm -rf $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (torch is a large download)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
