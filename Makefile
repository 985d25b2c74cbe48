# `make demo` and `make test` do all the set-up themselves, in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= --quiet --disable-pip-version-check

.PHONY: demo test lint versions bench clean

demo: $(VENV)/.installed
	$(BIN)/python train/demo.py

# A worker a core and a thread a worker: most tests are small operations, which do not divide. Plain pytest runs them too.
test: $(VENV)/.installed versions lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed versions
	$(BIN)/python benchmarks/bench_ffn.py --compiled

versions: $(VENV)/.installed
	@$(BIN)/python -c "import platform, torch, transformers; \
	device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU ({torch.get_num_threads()} threads)'; \
	print(f'Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, {device}')"

# torch comes first and alone: a machine's own build satisfies the constraint, and nothing after it pulls another. A CUDA
# build brings its triton; beside a CPU build the kernels are interpreted and compiled with the version tested most.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt torch
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install $(PIP_FLAGS) triton==3.6.0 \
	|| echo "triton is not to be had here: tests of the kernels will be skipped"
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
