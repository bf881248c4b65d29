# Two commands on a fresh clone, each of which sets everything up first:
#   make reproduce   the whole study; PROFILE=demo (default), reduced or paper
#   make test        the tests
# DATA= SAM= point at real datasets and SAM weights; DATASETS= PERCENTS= SEEDS= narrow the study;
# EXTRAS=no leaves out supervised-only runs and ablations; JOBS= steps at a time.
# Others: make report (one HTML page of the results; PICTURES=yes shows real photographs in it),
# make bench (what the method costs), make lab (JupyterLab), make clean (what was made on the way).
# For maintainers: make walkthroughs (run notebooks/0* anew), make docs (docs/api.md, README's table).

PYTHON ?= python3
VENV   ?= .venv
PROFILE ?= demo
DATA ?=
SAM ?=
DATASETS ?=
PERCENTS ?=
SEEDS ?=
JOBS ?=
EXTRAS ?=
PICTURES ?=

BIN := $(VENV)/bin
# uv trusts the certificates that this machine trusts, as pip does
export UV_SYSTEM_CERTS ?= 1
# "5 10", "5,10" and "5, 10" are the same list
comma := ,
empty :=
space := $(empty) $(empty)
list = $(subst $(space),$(comma),$(strip $(subst $(comma),$(space),$(1))))
option = $(if $(strip $(2)),--$(1) "$(2)")

.PHONY: help setup reproduce test bench report walkthroughs docs lab soak clean lock

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "Python 3.10 to 3.13 is needed, %s is %d.%d; choose another: make PYTHON=python3.11 ..." % ((sys.executable,) + v))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

reproduce: setup
	$(BIN)/xmask reproduce --profile $(PROFILE) $(call option,data,$(DATA)) \
	  $(call option,sam,$(SAM)) $(call option,datasets,$(call list,$(DATASETS))) \
	  $(call option,percents,$(call list,$(PERCENTS))) \
	  $(call option,seeds,$(call list,$(SEEDS))) $(call option,jobs,$(JOBS)) \
	  $(if $(filter no,$(EXTRAS)),--no-extras)

test: setup
	$(BIN)/python -m pytest -q

# hours: kills, hostile files and memory; writes its numbers into docs/reliability.md
soak: setup
	$(BIN)/python -m tests.soak

bench: setup
	$(BIN)/xmask bench

report: setup
	$(BIN)/xmask report --profile $(PROFILE) $(call option,data,$(DATA)) $(if $(PICTURES),--pictures)

walkthroughs: setup
	$(BIN)/xmask docs --walkthroughs

docs: setup
	$(BIN)/xmask docs

lab: setup
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf work build .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# for maintainers: resolve the dependencies anew (then update environment.yml)
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra test --universal --fork-strategy fewest \
	  --python-version 3.10 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --upgrade --output-file requirements.lock
