# Everything runs in a virtual environment of its own (.venv), made on first use.
PYTHON ?= python3
VENV ?= .venv
# The torch to install where the environment has none yet; TORCH= names another one. `make wheels` takes several: the first builds.
TORCH ?= torch==2.13.0
# The codes in 6 epochs, then a class-conditional prior over them in 18.
DEMO := --num-codes 64 --replace-dead-below 0.5 --class-conditional --batch-size 32 --epochs 24 --prior-only 0.75 --lr-decay 0.75 \
	--lr-prior 0.002 --prior-width 96 --prior-layers 3 --prior-shift 2 --prior-dropout 0.1 --sample-temperature 0.7
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc kernels genperf -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test lint format docs wheels bench systems gpu-report clean

demo: $(VENV)/installed-train
	$(BIN)/python -m genperf
	$(BIN)/genperf train vqvae $(DEMO) --out runs/demo --overwrite

# One process per core with one thread each; tests of several threads set the number themselves.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# The documentation as a site, in build/site. A broken link is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# A wheel of the CPU libraries in dist/, tested with each of PYTHONS, and with a cross compiler one for aarch64.
wheels: $(VENV)/torch
	.ci/wheels $(PYTHONS)

bench: $(VENV)/installed-bench
	$(BIN)/genperf bench --device cpu --out benchmarks/results

systems: $(VENV)/installed-train
	$(BIN)/python benchmarks/systems.py
	$(BIN)/python benchmarks/systems.py --equal

# For a machine with a GPU and no network: it uses the Python that is there and what that has installed.
gpu-report:
	$(PYTHON) benchmarks/gpu_report.py measure --out runs/gpu
	$(PYTHON) benchmarks/gpu_report.py test --out runs/gpu
	$(PYTHON) benchmarks/gpu_report.py render runs/gpu

clean:
	rm -rf build dist $(VENV) *.egg-info genperf/*.so

$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q '$(firstword $(TORCH))'
	$(BIN)/pip install -q numpy ninja 'setuptools>=77'
	touch $@

$(VENV)/installed-%: $(VENV)/torch $(SOURCES)
	GENPERF_COMPILE=1 $(BIN)/pip install -q --no-build-isolation -e '.[$*]'
	# A rival of the benchmarks and tests; what it depends on would bring another torch.
	$(if $(filter train,$*),,$(BIN)/pip install -q --no-deps pytorch-fid==0.3.0)
	touch $@
