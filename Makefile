# A fresh machine needs Python 3.11 or newer, make and a package registry. Everything else goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
PYTEST := $(BIN)/python -m pytest -n $(or $(WORKERS),2)
IN_FLOAT64 := $(addprefix tests/test_,rules.py problems.py quasi_newton.py) -m "not slow"
# What other versions of Keras, TensorFlow and NumPy can break: private names, files, the step, and every example.
ON_LOWEST := $(addprefix tests/test_,keras_internals.py rules.py step.py citizen.py saving.py loading.py backup.py \
  callback_base.py polyak_fit.py ensemble.py data.py minimize.py quasi_newton_fit.py \
  finder.py tuner.py plot.py trajectories.py) kopt
BENCHES := $(addprefix bench-,step $(if $(filter torch,$(KERAS_BACKEND)),,conditions) backup schedules averages ensembles fine-tuning minimize search)
OUT ?= out/quickstart
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help demo test test-all test-tensorflow test-jax test-torch test-slow test-lowest test-plain soak compare-resume lint format bench
.PHONY: averages snapshots second-order learning-rates rates gallery momentum batch-sizes regularizers transfer transfer-images
.PHONY: bench-search bench-step bench-minimize bench-conditions bench-backup bench-schedules bench-averages bench-ensembles bench-fine-tuning clean
.DEFAULT_GOAL := help

help:  ## List what make can do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.dev  ## Train a small network with every rule; writes a picture and the figures to out/quickstart
	$(BIN)/python recipes/quickstart.py --out $(OUT)

test: test-tensorflow  ## Run the tests on TensorFlow

test-all: test-tensorflow test-jax test-torch  ## Run the tests on TensorFlow, JAX and torch

test-tensorflow: $(VENV)/.dev
	KERAS_BACKEND=tensorflow KOPT_FLOATX=float64 $(PYTEST) $(IN_FLOAT64)
	KERAS_BACKEND=tensorflow $(PYTEST) -m "not slow"

test-jax: $(VENV)/.jax
	KERAS_BACKEND=jax KOPT_FLOATX=float64 $(PYTEST) $(IN_FLOAT64)
	KERAS_BACKEND=jax $(PYTEST) -m "not slow"

test-torch: $(VENV)/.torch
	OMP_NUM_THREADS=1 KERAS_BACKEND=torch KOPT_FLOATX=float64 $(PYTEST) $(IN_FLOAT64)
	OMP_NUM_THREADS=1 KERAS_BACKEND=torch $(PYTEST) -m "not slow"

test-slow: $(VENV)/.jax $(VENV)/.torch  ## Run what takes long on the three backends: trainings killed at random moments
	for backend in tensorflow jax torch; do KERAS_BACKEND=$$backend $(PYTEST) -m slow || exit 1; done

test-lowest:  ## Run, on the lowest versions that are allowed, what versions can break
	$(MAKE) .venv-lowest/.dev VENV=.venv-lowest CONSTRAINTS=.ci/constraints-lowest.txt
	KERAS_BACKEND=tensorflow .venv-lowest/bin/python -m pytest -n $(or $(WORKERS),2) -m "not slow" $(ON_LOWEST)

test-plain:  ## Run KerasTuner's four tuners where nothing but kopt was installed
	$(MAKE) .venv-plain/bin/python VENV=.venv-plain
	.venv-plain/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) .
	.venv-plain/bin/python tests/four_tuners.py

soak: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Kill a training KILLS times (500) at random moments, on KERAS_BACKEND; the store many times more
	KOPT_SOAK=$(or $(KILLS),500) $(BIN)/python -m pytest -s tests/test_resume.py -k any_moment
	KOPT_SOAK=$(or $(KILLS),500) $(BIN)/python -m pytest -s tests/test_store_crash.py -k killed_process

compare-resume: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Stop and resume eight trainings with Keras's callback and kopt's, on KERAS_BACKEND
	$(BIN)/python -m tests.resume compare

lint: $(VENV)/.dev  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

averages: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Average one training in many ways; 8 seeds, a picture, in out/polyak
	$(BIN)/python recipes/polyak.py --check --out out/polyak

snapshots: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Snapshot ensembles beside other ways to spend the same epochs; 30 seeds, a picture, in out/snapshots
	$(BIN)/python recipes/snapshot_ensemble.py --check --out out/snapshots

second-order: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## A physics-informed network by Adam, L-BFGS and self-scaled Broyden; 5 seeds, a picture, in out/lbfgs
	$(BIN)/python recipes/lbfgs.py $(if $(SMOKE),--smoke,--check) --out out/lbfgs

learning-rates: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Search a learning rate from coarse to fine; a report and a picture, in out/lr_search
	$(BIN)/python recipes/lr_search.py $(if $(SMOKE),--smoke,--check) --out out/lr_search

rates: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Loss curves at rates too low, good and too high; 5 seeds, a picture, in out/rates
	$(BIN)/python recipes/rates.py $(if $(SMOKE),--smoke,--check) --out out/rates
	$(if $(SMOKE),,cp out/rates/rates.png recipes/pictures)

gallery: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## The README's pictures of optimizers, rates and loss surfaces, into recipes/pictures
	$(BIN)/python recipes/landscapes.py $(if $(SMOKE),--smoke,--check) --out out/gallery
	$(if $(SMOKE),,cp out/gallery/*.gif out/gallery/*.png recipes/pictures)

momentum: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Momentum annealed from 0.5 to 0.99 beside momenta that stay; 16 seeds, a picture, in out/momentum
	$(BIN)/python recipes/momentum_anneal.py $(if $(SMOKE),--smoke,--check) --out out/momentum

batch-sizes: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Batches of 8 to 512 and two rules for the rate; 12 seeds, a picture, in out/batch_sizes
	$(BIN)/python recipes/batch_size.py $(if $(SMOKE),--smoke,--check) --out out/batch_sizes

regularizers: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Regularizers on and off, with ten labels a class; 16 seeds, a picture, in out/regularizers
	$(BIN)/python recipes/regularizers.py $(if $(SMOKE),--smoke,--check) --out out/regularizers

transfer-images: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Fine-tune MobileNetV2 on few images, of your own with DATA=folder; a picture, in out/transfer_images
	$(BIN)/python recipes/transfer_images.py $(if $(SMOKE),--smoke,--check) $(if $(DATA),--data $(DATA)) --out out/transfer_images

transfer: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Fine-tuning beside training from scratch on 10 to 50 labels; 16 draws, a picture, in out/transfer
	$(BIN)/python recipes/transfer_digits.py $(if $(SMOKE),--smoke,--check) --out out/transfer

bench: $(BENCHES) $(if $(SMOKE),,second-order learning-rates)  ## All of the following, second-order and learning-rates, on KERAS_BACKEND; SMOKE=1 for a quick look at the former

bench-step: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Time an optimizer's step beside Keras's
	$(BIN)/python tests/bench/step.py --out out/bench-$(or $(KERAS_BACKEND),tensorflow).json $(if $(SMOKE),--smoke)

bench-conditions: $(VENV)/.$(or $(filter jax,$(KERAS_BACKEND)),dev)  ## Time the forms of a condition in a compiled step
	$(BIN)/python tests/bench/conditions.py $(if $(SMOKE),--smoke)

bench-backup: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Time a save of BackupAndRestore beside Keras's
	$(BIN)/python tests/bench/backup.py $(if $(SMOKE),--smoke)

bench-schedules: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Time a training step with and without a schedule in it
	$(BIN)/python tests/bench/schedules.py $(if $(SMOKE),--smoke)

bench-averages: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Time a training step with Keras's average of the weights and with kopt's
	$(BIN)/python tests/bench/averaging.py $(if $(SMOKE),--smoke)

bench-ensembles: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Time the predictions of five models in a row and as one kopt.Ensemble
	$(BIN)/python tests/bench/ensembles.py $(if $(SMOKE),--smoke)

bench-fine-tuning: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Time a step with multipliers, and a training whose body rests
	$(BIN)/python tests/bench/fine_tuning.py $(if $(SMOKE),--smoke)

bench-minimize: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## Evaluations that L-BFGS needs beside others; evaluations a second of minimize and fit
	$(BIN)/python -m tests.bench.minimize $(if $(SMOKE),--smoke,--all)

bench-search: $(VENV)/.$(or $(filter jax torch,$(KERAS_BACKEND)),dev)  ## What the learning rates are worth that kopt and KerasTuner's tuners choose in as many epochs
	$(BIN)/python tests/bench/search.py --out out/bench-search.json $(if $(SMOKE),--smoke)

clean:  ## Remove what make has made
	rm -rf .venv .venv-lowest .venv-plain out build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@for p in $(PYTHON) python3 python3.11 python3.12 python3.13; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec $$p -m venv $(VENV); \
	done; echo "kopt needs Python 3.11 or newer; say where it is: make PYTHON=/path/to/python3" >&2; exit 1

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "Installing into $(VENV); this takes a minute or two, once."
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.jax: $(VENV)/.dev
	$(PIP) --editable '.[jax]'
	@touch $@

$(VENV)/.torch: $(VENV)/.dev
	$(PIP) --editable '.[torch]'
	@touch $@
