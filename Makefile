# make demo   set up .venv and run BERT on the shipped checkpoint
# make test   set up .venv and run the tests
# make bench  time ops and models on the available device, into FILE if it is given
# make readme print the README's figures, docs/results.md and pictures from bench/results/
# make compat run the tests with the oldest and newest torch and transformers of tox.ini
# make hf-tests SRC=FOLDER   transformers' own tests of BERT, from a checkout; MODELS="bert roberta"
# make gpu    on a GPU: tests on the real kernels, sanitizer, benchmark, tuning, counters, each into a
#             file in OUT; PART=tests, sanitize, bench, tune or ncu for that one alone; with a Python
#             that has torch, as PYTHON=.venv/bin/python
# make checkpoint   retrain the shipped checkpoint, into DIR; make lint; make clean
#
# Without a GPU (docs/how_it_is_checked.md):
# make check OP=layer_norm   every check of one op, in one to five minutes for a small one
# make fuzz CASES=100000     random cases against the definition; SEED=, OP=, JSON=, or one CASE=;
#                            ARCH=sm_90 for compiled kernels
# make mutants               bugs made from the kernels, each must be found; SAMPLE=, OP=, JSON=
# make aot                   every kernel compiled: resources, predicted time; OP=, ARCH=, JSON=
# make compiled              every kernel compiled and executed, in an emulator; OP=, ARCH=
# make overhead              how long Python takes to launch a forward

PYTHON ?= python3
OUT ?= bench/results
BIN := .venv/bin

# The folder kernels/ must not be importable as `kernels`, a distribution that transformers looks for.
export PYTHONSAFEPATH := 1

INTERPRETED := tests/test_ops.py tests/test_modeling.py tests/test_linear.py tests/test_check.py \
	tests/test_fuzz.py tests/test_interpreter.py tests/test_mutants.py tests/test_sanitizer.py \
	tests/test_waits.py tests/test_variants.py tests/test_dropout.py::test_trains_as_stock_with_the_same_draws
CASES := 2000
# One process per core, each with one thread: tests are small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-interpreter test-native check fuzz mutants aot compiled overhead bench readme \
	compat hf-tests gpu checkpoint lint clean

demo: .venv/ready
	$(BIN)/bert-fast demo

test: test-interpreter test-native

# The Triton kernels, run by Triton's interpreter on the CPU.
test-interpreter: .venv/ready
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

# The CPU's own implementations, or the kernels on a GPU; and everything else.
test-native: .venv/ready
	$(PYTEST)

check: .venv/ready
	@TRITON_INTERPRET=1 $(BIN)/python check op $(OP)

fuzz: .venv/ready
	@$(if $(ARCH),,TRITON_INTERPRET=1) $(BIN)/python check fuzz $(OP:%=--op %) $(ARCH:%=--arch %) \
		$(if $(CASE),--case '$(CASE)',--cases $(CASES) $(SEED:%=--seed %) $(JSON:%=--json %))

mutants: .venv/ready
	@TRITON_INTERPRET=1 $(BIN)/python check mutants $(OP:%=--op %) $(SAMPLE:%=--sample %) $(JSON:%=--json %)

aot: .venv/ready
	@$(BIN)/python check aot $(OP:%=--op %) $(ARCH:%=--arch %) $(JSON:%=--json %)

compiled: .venv/ready
	@$(BIN)/python check compiled $(OP:%=--op %) $(ARCH:%=--arch %)

overhead: .venv/ready
	@$(BIN)/python check overhead

bench: .venv/ready-to-bench
	$(BIN)/python bench all $(if $(FILE),--output "$(FILE)")

readme: .venv/ready-to-bench
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt matplotlib
	$(BIN)/python bench readme

compat: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt tox
	$(BIN)/tox run

hf-tests: .venv/ready
	@test -f "$(SRC)/tests/test_modeling_common.py" \
		|| { echo "hf-tests: SRC must be a checkout of transformers, got '$(SRC)'"; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt tox
	SRC="$(abspath $(SRC))" $(BIN)/tox run -e hf -- $(MODELS:%=--model %)

# No network: Python on a GPU machine has its own torch and triton.
gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) bench gpu --folder "$(OUT)" $(if $(PART),--part $(PART))

checkpoint: .venv/ready
	$(BIN)/python training/train.py --out "$(or $(DIR),checkpoint)"

lint: .venv/ready
	$(BIN)/pip install -q -c constraints.txt ruff
	$(BIN)/ruff check .

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

.venv/ready-to-bench: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
