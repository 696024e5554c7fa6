# Everything a fresh machine needs: Python 3.11 or newer and make. Each target makes its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The model packages behind extras, which tests compare with; the demo needs none of them.
MODELS := magpie,orpheus,diffusion
MODELS_READY := $(VENV)/.ready-models
# The engines that benchmarks compare with pin other versions (numpy < 2.2), so they live apart.
BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
MODEL_BENCHMARKS := benchmarks/magpie_online.py benchmarks/magpie_bytes.py \
  benchmarks/quantized_linear.py benchmarks/lm_guidance.py benchmarks/diffusion_rows.py \
  benchmarks/digits_proof.py
BENCHMARK_PARTS := %/measure.py %/peers.py %/magpie_shapes.py %/lm_shapes.py %/lm_rivals.py \
  %/diffusion_shapes.py %/diffusion_rivals.py
BENCHMARKS := $(filter-out $(BENCHMARK_PARTS) $(MODEL_BENCHMARKS),$(wildcard benchmarks/*.py))

# Two processes of one thread do about twice the work of one process with two threads, and spinning
# OpenMP threads would take that away again. Tests of a file share what they made, so they stay
# together, and the longest files come first, where tests/conftest.py puts them.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-fast lint format bench clean

demo: $(READY) ## a teacher, its store, two students and a report on real speech (under 40 minutes)
	$(BIN)/foretell run configs/demo.yaml
	@echo "Open runs/demo/report/report.html"

test: $(MODELS_READY) ## everything, the miniature of the demo included
	$(PYTEST) --durations=15

test-fast: $(READY) ## unit tests, under two minutes
	$(PYTEST) -m "not slow"

lint: $(READY) ## formatter, linter and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## apply the formatter and the linter's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(BENCH_READY) $(MODELS_READY) ## one decision per script; the last line of each is JSON
	@for script in $(BENCHMARKS); do \
	  echo "== $$script"; $(BENCH_VENV)/bin/python $$script || exit 1; \
	done
	@for script in $(MODEL_BENCHMARKS); do \
	  echo "== $$script"; $(BIN)/python $$script || exit 1; \
	done

# The stamp is written last: an interrupted installation is finished by the next call.
$(READY): VENV_EXTRA := dev
$(BENCH_READY): VENV_EXTRA := bench
$(READY) $(BENCH_READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "foretell needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Installing into $(@D): several minutes the first time (torch alone is large)"
	$(@D)/bin/python -m pip install --disable-pip-version-check --progress-bar on \
	  -e '.[$(VENV_EXTRA)]'
	@touch $@

# Without a compiler NeMo cannot be installed; its tests then say so and are skipped, except in CI.
$(MODELS_READY): $(READY)
	@echo "Installing NeMo for the tests that compare with it: three minutes the first time"
	@if $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on \
	    --prefer-binary -e '.[$(MODELS)]'; then touch $@; \
	  elif [ -n "$$CI" ]; then exit 1; \
	  else echo "NeMo was not installed (see above), so the tests that need it will be skipped"; fi

clean: ## remove the venv and caches; runs/ stays
	rm -rf $(VENV) $(BENCH_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
