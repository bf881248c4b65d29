# Two commands on a fresh clone, each of which sets everything up first:
#   make reproduce   the whole study; PROFILE=demo (default), full, photo or paper
#   make test        the checks (ruff, basedpyright) and the tests
# DATA= SAM= point at real datasets and SAM weights; DATASETS= PERCENTS= SEEDS= narrow the study;
# EXTRAS=no leaves out supervised-only runs and ablations; JOBS= steps at a time;
# SCHEDULER=tcp://host:8786 or CLUSTER=slurm: other machines, see docs/cluster.md.
# Others: make report (one HTML page of the results; PICTURES=yes shows real photographs in it),
# make bench (what the method costs), make lab (JupyterLab), make clean (what was made on the way).
# For maintainers: make check, make docs (docs/api and README's table), make walkthroughs
# (run notebooks/0* anew), make audit (known vulnerabilities), make lock (newer versions).

PYTHON ?= python3
VENV   ?= .venv
PROFILE ?= demo
DATA ?=
SAM ?=
DATASETS ?=
PERCENTS ?=
SEEDS ?=
JOBS ?=
SCHEDULER ?=
CLUSTER ?=
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

.PHONY: help setup reproduce test check bench report walkthroughs docs lab soak clean audit lock

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -10

setup: $(VENV)/.ready

# Everything that runs here is pinned and hashed: uv by its own list, all else, setuptools
# included, by requirements.lock.
$(VENV)/.ready: requirements.lock requirements-uv.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "Python 3.10 to 3.13 is needed, %s is %d.%d; choose another: make PYTHON=python3.11 ..." % ((sys.executable,) + v))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

reproduce: setup
	$(BIN)/xmask reproduce --profile $(PROFILE) $(call option,data,$(DATA)) \
	  $(call option,sam,$(SAM)) $(call option,datasets,$(call list,$(DATASETS))) \
	  $(call option,percents,$(call list,$(PERCENTS))) \
	  $(call option,seeds,$(call list,$(SEEDS))) $(call option,jobs,$(JOBS)) \
	  $(call option,scheduler,$(SCHEDULER)) $(call option,cluster,$(CLUSTER)) \
	  $(if $(filter no,$(EXTRAS)),--no-extras)

test: check
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check --quiet .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# a quarter of an hour or more: kills, hostile files and memory; writes its numbers into docs/reliability.md
soak: setup
	$(BIN)/python -m tests.soak

bench: setup
	$(BIN)/xmask bench

report: setup
	$(BIN)/xmask report --profile $(PROFILE) $(call option,data,$(DATA)) $(if $(filter yes,$(PICTURES)),--pictures)

walkthroughs: setup
	$(BIN)/xmask docs --walkthroughs

docs: setup
	$(BIN)/pdoc --output-directory docs/api xmask '!xmask.__main__' '!xmask.bench.'
	$(BIN)/xmask docs

lab: setup
	$(BIN)/jupyter lab notebooks

# What steps of the study, and setuptools, make; all else in work/ and build/ is somebody's.
PROFILES := demo full photo paper
# Only demo and full draw data: in work/photo/data lies what somebody put there.
MADE := $(foreach profile,$(PROFILES),$(addprefix work/$(profile)/,.xmask logs masks notebooks \
  phase1 stamps)) $(foreach profile,demo full,$(addprefix work/$(profile)/,calibration data)) \
  work/edp_study work/sweeps

clean:
	@for folder in $(MADE); do \
	  if test -z "$$(find $$folder -name corrected -o -name '*.set-aside-*' 2>/dev/null)"; then \
	    rm -rf $$folder; fi; done
	rm -rf build/lib build/bdist.* build/temp.* docs/api .pytest_cache .hypothesis .ruff_cache
	@rmdir $(addprefix work/,$(PROFILES)) work build 2>/dev/null || true
	@for folder in work build; do test ! -d $$folder || find $$folder -mindepth 1 -maxdepth 1 \
	  -exec echo "stays, because it holds more than the study makes:" {} \; ; done
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Compare the locked versions with published advisories. The tool is fetched for the occasion;
# where the advisories cannot be reached it says so, and that is no failure.
define AUDIT
import json, sys
text = sys.stdin.read()
asked = [one for one in (json.loads(text)["dependencies"] if text else []) if "vulns" in one]
bad = [one for one in asked if one["vulns"]]
for one in bad:
    print(one["name"], one["version"], *(vuln["id"] for vuln in one["vulns"]))
print("audit:", "not done: no list of advisories can be reached from here" if not asked else
      f"{len(asked)} packages of requirements.lock, {len(bad)} with known vulnerabilities")
sys.exit(bool(bad))
endef
export AUDIT

audit: setup
	@$(BIN)/uvx --quiet pip-audit --disable-pip --require-hashes --progress-spinner off \
	  --format json -r requirements.lock 2>/dev/null | $(BIN)/python -c "$$AUDIT"

# resolve the dependencies anew (then update environment.yml)
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra test --universal --fork-strategy fewest \
	  --python-version 3.10 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --upgrade --output-file requirements.lock
	echo uv | $(BIN)/uv pip compile - --universal --python-version 3.10 --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header --upgrade --output-file requirements-uv.lock
