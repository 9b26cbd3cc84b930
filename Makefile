# Two commands set a fresh machine up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
# An NVIDIA driver that answers gets the CUDA build of JAX that it can run; anything else gets plain CPU.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
EXTRA := $(if $(CUDA),$(if $(filter 13 14 15,$(CUDA)),cuda13,cuda12))
comma := ,

.PHONY: demo test check clean
demo: $(VENV)/installed-demo
	$(VENV)/bin/pjengine generate demo --prompt 'def fibonacci(n):' --max-tokens 128 --stream

test: $(VENV)/installed-test check
	$(VENV)/bin/python -m pytest

check: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e '.$(if $(EXTRA),[$(EXTRA)])'
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e '.[test$(if $(EXTRA),$(comma)$(EXTRA))]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
