# Every target makes .venv and installs what it needs by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := $(wildcard zllm runtime runtime/models service clients cython cuda cuda/kernels cuda/include)
# CPU runs gain nothing from more threads than cores, and two processes share them.
export TOKENIZERS_PARALLELISM := false

.PHONY: demo serve test lint bench build sanitize clean

demo: build  ## start a server with the embedded model and stream answers from the real client
	$(BIN)/python -m zllm demo

serve: build
	$(BIN)/zllm serve $(ARGS)

test: build
	$(BIN)/python -m pytest -q $(ARGS)

# The folders' names differ from their import names: mypy gets a tree of links.
lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing/zllm
	ln -s $(CURDIR)/zllm/* $(addprefix $(CURDIR)/,runtime service clients cuda) build/typing/zllm/
	ln -s $(CURDIR)/cython build/typing/zllm/native
	ln -s $(wildcard $(CURDIR)/build/cp3*/stubs/zllm/v1) build/typing/zllm/v1
	$(BIN)/mypy -p zllm
	$(BIN)/mypy benchmarks
	PATH=$(abspath $(BIN)):$$PATH cython-lint cython
	cd protos && $(abspath $(BIN))/buf lint

# The interpreter leaks by design, so leaks are not looked for; -S keeps the editable install out.
SANITIZED := build/sanitize/root
SANITIZED_TESTS := tests/native tests/runtime/test_detokenizer.py tests/service/test_streams.py \
  tests/service/test_delta_encoder.py tests/service/test_delta_writer.py
sanitize: build  ## the native core's tests under AddressSanitizer and UBSan
	$(BIN)/pip install -q --no-deps --no-build-isolation --upgrade --target $(SANITIZED) \
	  -C cmake.define.ZLLM_SANITIZE=ON -C build-dir=build/sanitize/cmake .
	LD_PRELOAD=$$(gcc -print-file-name=libasan.so) PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(SANITIZED):$$($(BIN)/python -c 'import sys; print(":".join(filter(None, sys.path)))'):. \
	$(BIN)/python -SP -m pytest $(SANITIZED_TESTS) -q --noconftest -m "not slow" $(ARGS)

bench: build
	$(BIN)/python benchmarks/native.py
	$(BIN)/python benchmarks/cpu.py

build: $(VENV)/.installed

$(VENV)/.tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy
	$(BIN)/pip install -q -c constraints.txt scikit-build-core cython cmake ninja grpcio-tools
	@touch $@

# An editable install maps the files that exist: a new file changes its folder's mtime.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml CMakeLists.txt constraints.txt $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[cuda,dev,tracing]'
	@touch $@

clean:
	rm -rf $(VENV) build
