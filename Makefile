# The commands of the README. Everything runs in .venv, made on first use and used again after that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
PARITY_VERSIONS := 4.57.6 5.23.0

.PHONY: demo suite test lint parity bench constraints gpu wheels-gpu clean

demo: $(VENV)/.installed data/demo/train/manifest.json
	$(BIN)/ettin suite yamls/suite/demo.yaml $(DEMO_ARGS)

# the whole suite at nano: three phases for encoder and decoder, both crosses, a biphasic run, and the report
suite: $(VENV)/.installed data/nano/train/manifest.json
	$(BIN)/ettin suite yamls/suite/nano.yaml $(SUITE_ARGS)

data/nano/train/manifest.json data/demo/train/manifest.json: data/%/train/manifest.json: | $(VENV)/.installed
	$(BIN)/python data_prep/convert.py python-stdlib --out data/$* --train-tokenizer 8192 --chunk-length 254 --validation 0.03

# One process a core; a file's tests stay together, for they share fixtures. A process that dies ends the run at once:
# pytest-xdist waits for ever where it begins another one under loadfile.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# One folder per version of transformers, put in front of the environment's own. --no-deps: torch, numpy and the rest stay
# those of the environment; what each version needs beyond them is listed, pinned, so that parity is about transformers only.
PARITY_4.57.6 := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
PARITY_5.23.0 := transformers==5.23.0 huggingface_hub==2.4.0 tokenizers==0.23.3 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5

.parity/%/.installed: Makefile | $(VENV)/.installed
	rm -rf .parity/$*
	$(UV) --no-deps --target .parity/$* $(PARITY_$*)
	touch $@

parity: $(VENV)/.installed $(PARITY_VERSIONS:%=.parity/%/.installed)
	$(BIN)/python tests/parity.py
	@set -e; for version in $(PARITY_VERSIONS); do \
		PYTHONPATH=.parity/$$version $(BIN)/python tests/parity.py --expect $$version; done

bench: $(VENV)/.installed .parity/4.57.6/.installed
	$(BIN)/python benchmarks/cpu_vs_transformers.py --decoder-path .parity/4.57.6 $(BENCH_ARGS)

# Eight minutes on a machine with a GPU: the tests, the real job, the step alone. What fails does not keep the rest from being
# measured. With the environment where there is one, else with the system's python3, its torch, and the wheels of `wheels-gpu`.
# `make gpu DRY=1` goes through the same on a CPU, with nano.
GPU_SITE := build/gpu-site
ifdef DRY
GPU_PYTHON := $(BIN)/python
GPU_JOB := --device cpu --sizes nano --steps 2 --data data/nano --out build/gpu-dry
GPU_STEP := --device cpu --sizes nano --lengths 256 --step-tokens 1024 --repeats 2 --contenders ours --out build/gpu-dry
gpu: $(VENV)/.installed data/nano/train/manifest.json
else
GPU_STEP := --budget-seconds 100 --contenders ours
ifneq ($(wildcard $(VENV)/.installed),)
GPU_PYTHON := $(BIN)/python
else
GPU_PYTHON := PYTHONPATH=$(CURDIR)/$(GPU_SITE):$(CURDIR) $(PYTHON)
gpu: $(GPU_SITE)
endif
endif
gpu:
	status=0; \
	$(GPU_PYTHON) -m pytest -m gpu tests/model/test_gpu.py -rs || status=1; \
	$(GPU_PYTHON) benchmarks/real_job.py $(GPU_JOB) || status=1; \
	$(GPU_PYTHON) benchmarks/train_step.py $(GPU_STEP) || status=1; \
	exit $$status

$(GPU_SITE):
	$(PYTHON) benchmarks/wheels_gpu.py --unpack $(GPU_SITE)

wheels-gpu:
	$(PYTHON) benchmarks/wheels_gpu.py

# uv installs the pinned packages: pip's resolver does not end on the unpinned ones
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert (3, 10) <= sys.version_info < (3, 13), 'Python 3.10 to 3.12 is needed; set PYTHON=...'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt uv
	$(UV) -c constraints.txt -e ".[dev]"
	touch $@

# pins the newest versions that agree, for Python 3.10 to 3.12; run the tests, then commit the file
constraints: $(VENV)/.installed
	$(BIN)/uv pip compile setup.cfg --extra dev --universal --python-version 3.10 --upgrade --quiet \
		--no-annotate --custom-compile-command "make constraints" -o constraints.txt

clean:
	rm -rf $(VENV) .parity .wheels runs
