# Everything runs from a virtual environment in .venv; PYTHON makes it.
PYTHON ?= python3.11
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
OUTPUT ?= runs/quickstart

.PHONY: quickstart test check format clean

quickstart: .venv/quickstart.installed  ## fine-tune a teacher, distil it, compare the two
	.venv/bin/tinybert quickstart --output_dir $(OUTPUT)

test: check  ## linters, type checker, tests
	.venv/bin/python -m pytest -n auto

check: .venv/dev.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/dev.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch comes first and pinned: a range would fetch gigabytes of CUDA where a CPU build is at hand.
.venv/torch.installed: | .venv/bin/python
	$(PIP) torch
	touch $@

.venv/%.installed: pyproject.toml constraints.txt | .venv/torch.installed
	$(PIP) --editable ".[$*]"
	touch $@
