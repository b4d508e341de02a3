# corpusprep: every target installs what it needs; start with `make quickstart` or `make test`.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/$(basename $(notdir $(RECIPE)))
WORKERS ?=
ARGS ?=
TORCH ?= torch

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAGES := clean langid dedup quality balance instruct
RUN = $(BIN)/corpusprep run $(RECIPE) --out $(OUT) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

.PHONY: quickstart train-demo test test-bounds test-quality test-comet test-ray test-publish test-gpu check bench clean-out all wheel help $(STAGES)

help:  ## show this list
	@awk -F':.*## ' '/^[a-z$$()A-Z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "make STAGE        one of $(STAGES): redo it and the later stages, RECIPE=file OUT=folder"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "corpusprep needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@echo "compiling kernels (once)"
	$(BIN)/corpusprep compile
	@touch $@

quickstart: $(STAMP)  ## build the example's data and run all stages on it, offline
	$(BIN)/python examples/build.py out/example-data
	$(BIN)/corpusprep run examples/quickstart.toml --out out/quickstart

test: $(STAMP)  ## run the tests in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-bounds: $(STAMP)  ## run the tests of the stages with a check of every index in a kernel
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(CURDIR)/out/bounds $(BIN)/python -m pytest -n 2 --dist loadfile tests/stages

test-quality: $(STAMP)  ## run the tests of the comet scorer, which need PyTorch: TORCH=torch==2.13.0 sets the version
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile '$(TORCH)' -e '.[dev,quality]'
	$(BIN)/python -m pytest tests/stages/quality/comet tests/steps/test_comet_runs.py

$(VENV)-comet/.installed: pyproject.toml
	test -x $(VENV)-comet/bin/python || $(PYTHON) -m venv $(VENV)-comet
	$(VENV)-comet/bin/python -m pip install --quiet --disable-pip-version-check --no-compile '$(TORCH)' -e '.[dev,comet]'
	@touch $@

test-comet: $(VENV)-comet/.installed  ## compare the comet scorer with COMET itself, in a separate environment: .venv-comet
	$(VENV)-comet/bin/python -m pytest tests/stages/quality/comet/test_unbabel.py

$(VENV)-ray/.installed: pyproject.toml
	test -x $(VENV)-ray/bin/python || $(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,ray]'
	@touch $@

test-ray: $(VENV)-ray/.installed  ## run the tests of the engine ray, on clusters on this machine, in a separate environment: .venv-ray
	$(VENV)-ray/bin/python -m pytest tests/engines/test_ray.py

$(VENV)-publish/.installed: pyproject.toml
	test -x $(VENV)-publish/bin/python || $(PYTHON) -m venv $(VENV)-publish
	$(VENV)-publish/bin/python -m pip install --quiet --disable-pip-version-check --no-compile 'aiobotocore[boto3]' 'moto[server]>=5.1' -e '.[dev,publish]'
	@touch $@

test-publish: $(VENV)-publish/.installed  ## run the tests of publishing, on servers on this machine, in a separate environment: .venv-publish
	$(VENV)-publish/bin/python -m pytest tests/commands/test_publish_s3.py tests/commands/test_publish_hub.py

test-gpu: $(STAMP)  ## run the tests that need a GPU, for scoring and training
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile '$(TORCH)' -e '.[dev,quality,train]'
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else f"PyTorch {torch.__version__} sees no GPU: choose another build with TORCH")'
	CORPUSPREP_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu

train-demo: $(STAMP)  ## train a tiny model on the quickstart's mix, in two stages, on the CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile '$(TORCH)' -e '.[dev,train]'
	test -d out/quickstart/mix || $(MAKE) quickstart
	rm -rf out/train-demo
	$(BIN)/python examples/tiny_model.py out/quickstart/mix out/train-demo/model
	$(BIN)/corpusprep train examples/train_demo.toml --mix out/quickstart/mix --out out/train-demo/run

check: $(STAMP)  ## check format, lint and types, and run the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(STAMP)  ## compare with other tools, into tests/benchmarks/RESULTS.md: PARTS=langid,search,... DATA=folder with real text
	TORCH='$(TORCH)' $(BIN)/python tests/benchmarks/bench.py $(if $(PARTS),--parts $(PARTS)) $(if $(DATA),--data $(DATA))

wheel: $(STAMP)  ## build a wheel in dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

all: recipe-named $(STAMP)  ## run a whole recipe: RECIPE=file OUT=folder
	$(RUN)

$(STAGES): recipe-named $(STAMP)
	$(RUN) --redo $@

.PHONY: recipe-named
recipe-named:
	@test -n "$(RECIPE)" || { echo "Name a recipe: make $(MAKECMDGOALS) RECIPE=examples/llamax2.toml OUT=out/llamax2"; exit 2; }

clean-out:  ## remove out/
	rm -rf out
