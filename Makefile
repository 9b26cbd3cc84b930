# Two commands set a fresh machine up: `make demo` and `make test`.
VENV := .venv
TEST_EXTRAS := test
# The first of these that is new enough; `make PYTHON=/path/to/python demo` takes another.
PYTHON ?= $(firstword $(foreach name,python3 python3.12 python3.13 python3.14,$(shell \
	$(name) -c 'import sys; sys.version_info < (3, 12) or print("$(name)")' 2>/dev/null)))
# An NVIDIA driver that answers gets the CUDA build of JAX that it can run; anything else gets plain CPU.
# The version reads "CUDA Version: 13.0" in most releases of nvidia-smi, "CUDA UMD Version: 13.0" in some.
CUDA_EXTRA := $(shell nvidia-smi 2>/dev/null | awk 'match($$0, /CUDA[A-Za-z ]*Version *: *[0-9]+/) { \
	version = substr($$0, RSTART, RLENGTH); sub(/.*[^0-9]/, "", version); version += 0; \
	print (version >= 13 ? "cuda13" : version >= 12 ? "cuda12" : ""); exit }')
comma := ,
# Tests compile for an H200. JAX's CUDA build can; elsewhere these two wheels of it are enough. They lie in a folder of
# their own: among the other packages JAX would take them for a broken build, and say so at every start.
CUDA_COMPILER := $(if $(CUDA_EXTRA),,$(if $(filter Linux,$(shell uname -s)),jax-cuda13-plugin jax-cuda13-pjrt))
# Of two processes on one GPU, the first would take its memory. After a crash xdist may wait for ever: it ends then.
TWO_AT_ONCE := $(if $(CUDA_EXTRA),,-n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0)

.PHONY: demo test test-all test-sweep test-jax-triton jax-triton-tests notebooks check clean
demo: $(VENV)/installed-demo
	$(VENV)/bin/pjengine generate demo --prompt 'def fibonacci(n):' --stream \
		--temperature 0.6 --top-p 0.95 --sampling-seed 115

test: $(VENV)/installed-test $(if $(CUDA_COMPILER),$(VENV)/cuda-compiler) check
	$(VENV)/bin/python -m pytest $(TWO_AT_ONCE) -m 'not slow and not sweep'

# What CI runs.
test-all: $(VENV)/installed-test $(if $(CUDA_COMPILER),$(VENV)/cuda-compiler) check
	$(VENV)/bin/python -m pytest $(TWO_AT_ONCE) --durations=40 -m 'not sweep'

# Further cases of what CI runs some of: every kernel of every shape compiled, every golden case through the engine.
test-sweep: $(VENV)/installed-test $(if $(CUDA_COMPILER),$(VENV)/cuda-compiler)
	$(VENV)/bin/python -m pytest $(TWO_AT_ONCE) --durations=40 -m sweep

# The `jax_triton` kernels work with an older JAX than the other tests have: in a virtual environment of their own.
test-jax-triton:
	$(MAKE) VENV=$(VENV)-jax-triton TEST_EXTRAS=test,triton jax-triton-tests

jax-triton-tests: $(VENV)/installed-test $(if $(CUDA_COMPILER),$(VENV)/cuda-compiler)
	$(VENV)/bin/python -m pytest $(TWO_AT_ONCE) tests/compile/test_jax_triton.py tests/kernels/test_jax_triton_attention.py

# Runs every notebook and keeps its outputs; one alone: python notebooks/run.py NAME
notebooks: $(VENV)/installed-test
	$(VENV)/bin/python notebooks/run.py

check: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.12 or newer is needed, found none: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e '.$(if $(CUDA_EXTRA),[$(CUDA_EXTRA)])'
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e '.[$(TEST_EXTRAS)$(if $(CUDA_EXTRA),$(comma)$(CUDA_EXTRA))]'
	touch $@

$(VENV)/cuda-compiler: $(VENV)/installed-test
	version=$$($(VENV)/bin/python -c 'import jaxlib; print(jaxlib.__version__)') && $(VENV)/bin/python -m pip \
		install -q --no-deps --upgrade --target $@ $(patsubst %,%==$$version,$(CUDA_COMPILER))
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-jax-triton build dist *.egg-info
