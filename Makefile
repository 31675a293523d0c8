# make setup   .venv with everything the program needs
# make demo    set-up, toy data, FT and MIB on a two-step task (about 5 minutes on 2 cores)
# make test    set-up, lint, type check, tests; of one room: make test ROOM=methods
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# A .venv made by another interpreter than a PYTHON given by hand is made anew.
VERSION = -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
ifneq ($(origin PYTHON),file)
  ifneq ($(shell $(PYTHON) $(VERSION)),$(shell test -x $(BIN)/python && $(BIN)/python $(VERSION)))
    STALE := stale
  endif
endif

.PHONY: stale setup demo compare results test test-long lint types bench iabn check-weights clean

setup: $(VENV)/.installed

stale:

$(BIN)/python: $(STALE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10: make $(MAKECMDGOALS) PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: requirements.txt $(STALE) | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.tools: tests/requirements.txt requirements-extras.txt $(VENV)/.installed
	$(PIP) -r tests/requirements.txt
	@touch $@

# Both go on where they were stopped: Ctrl-C writes a checkpoint.
RUN = $(abspath $(BIN))/python $(CURDIR)/run.py --continue_ckpt

demo: $(VENV)/.installed demo/toy/.made
	@cd demo && $(RUN) --data_root toy --task 15-5 --overlap --step all --method FT,MIB --name demo \
	  --backbone resnet18 --no-pretrained --crop_size 96 --batch_size 8 --epochs 14,10 \
	  --lr 0.05,0.01 --val_interval 7 --sample_num 4
	@cd demo && PYTHONPATH=$(CURDIR) $(abspath $(BIN))/python -m engine.gallery --count 2 \
	  --out gallery.png checkpoints/step/voc-15-5-ov/demo-base_0.pth \
	  checkpoints/step/voc-15-5-ov/demo-FT_1.pth checkpoints/step/voc-15-5-ov/demo-MIB_1.pth
	@echo "panels (image | truth | prediction): demo/logs/voc-15-5-ov/<run>/step-1/images"
	@echo "curves: $(BIN)/tensorboard --logdir demo/logs"

demo/toy/.made: data/make_toy.py | $(VENV)/.installed
	@$(BIN)/python data/make_toy.py --out demo/toy
	@touch $@

# All methods from one step 0: make compare DATA=folder [COMPARE="flags of run.py"]
DATA ?= data
COMPARE ?= --dataset voc --task 15-5 --overlap --backbone resnet18 --no-pretrained --crop_size 128 \
  --batch_size 8 --epochs 12,6 --lr 0.05,0.002 --val_interval 100
compare: $(VENV)/.installed
	@mkdir -p compare
	@cd compare && $(RUN) --data_root $(abspath $(DATA)) --step all --name all \
	  --method FT,LWF,LWF-MC,ILT,EWC,RW,PI,MIB $(COMPARE)

# The table of docs/RESULTS.md, every method on street scenes, an hour and a half a seed on one core;
# started again it goes on: make results DATA=folder [SEEDS="42"] [TASKS="6-5"]
# EWC, RW and PI have the learning rate that their penalty is stable at. They come first, because
# the step 0 that all share is to collect their importances.
SEEDS ?= 42 1 2
TASKS ?= 6-5 7-1
RESULTS ?= --dataset camvid --overlap --backbone resnet18 --no-pretrained --crop_size 96 \
  --batch_size 8 --val_interval 100
results: $(VENV)/.installed
	@mkdir -p results
	@cd results && for seed in $(SEEDS); do for task in $(TASKS); do \
	  case $$task in 6-5) epochs=15,10 ;; *) epochs=15,4 ;; esac; \
	  for group in EWC,RW,PI=0.001 FT,LWF,LWF-MC,ILT,MIB,PLOP,MIB+EWF,PLOP+EWF,PLOP+LGKD=0.02; do \
	    $(RUN) --data_root $(abspath $(DATA)) $(RESULTS) --task $$task --step all --random_seed $$seed \
	      --epochs $$epochs --method $${group%=*} --lr 0.05,$${group#*=} || exit; \
	  done; done; done
	@cd results && $(abspath $(BIN))/python $(CURDIR)/report.py --plot steps.png
	@cd results && PYTHONPATH=$(CURDIR) $(abspath $(BIN))/python -m engine.gallery --out scenes.png \
	  $(patsubst %,checkpoints/step/camvid-$(firstword $(TASKS))-ov/%.pth,base_0 FT_1 MIB_1)

# Minutes each; quiet machine, or the ratios mean little. DATA: VOC's layout (default: toy images)
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.ceilings
	$(BIN)/python -m benchmarks.loss --growth
	$(BIN)/python -m benchmarks.data $(if $(filter-out data,$(DATA)),--data_root $(DATA))
	$(BIN)/python -m benchmarks.data --workers 0 1 2 --samples 256 $(if $(filter-out data,$(DATA)),--data_root $(DATA))
	$(BIN)/python -m benchmarks.norm --batch 2
	$(BIN)/python -m benchmarks.eval
	$(BIN)/python -m benchmarks.step --crop_size 256 --batch_size 2 --phases
	$(BIN)/python -m benchmarks.startup

lint: $(VENV)/.tools
	$(BIN)/ruff check .

types: $(VENV)/.tools
	$(BIN)/mypy

# One room in seconds: make test ROOM=methods
ROOM ?=
test: lint types
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadgroup \
	  -m "not long" $(if $(ROOM),tests/$(ROOM),)

test-long: $(VENV)/.tools
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadgroup -m long

# In-Place ABN's own CUDA kernels; README says when they pay. Needs nvcc for a CUDA torch.
iabn: $(VENV)/.installed
	$(PIP) setuptools setuptools_scm wheel ninja
	$(PIP) --no-build-isolation --no-deps inplace-abn

check-weights: $(VENV)/.installed
	$(BIN)/python pretrained/check_md5.py

clean:
	rm -rf $(VENV) demo compare results .mypy_cache .ruff_cache .pytest_cache
