# make demo · make test · make faults · make sabotage · make build · make lint · make bench · make bench-micro · make guard · make profile · make asan · make wheel · make lock · make clean
# PYTHON=/path/to/python3.13 chooses another interpreter than the first suitable one on PATH.

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-script-location
# A dependency group of pyproject.toml, one requirement a line (pip below 25.1 cannot read them).
GROUP    = $(BIN)/python -c 'import sys, tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]], sep="\n")'
SOURCES := $(wildcard core/tapebus/*.pyx core/tapebus/*.pxd core/tapebus/*.h)
WORKERS ?= 2
# What `make asan` tests: the modules that handle memory themselves.
COMPILED := ring scan blocks outbox ingest security decode bands codec

export PIP_ROOT_USER_ACTION := ignore

.PHONY: demo test faults sabotage build lint format bench bench-micro guard profile asan wheel lock lock-check clean

demo: $(VENV)/.built
	@$(BIN)/tapebus demo

test: $(VENV)/.built $(VENV)/.test
	@$(BIN)/pytest -q -n $(WORKERS) $(ARGS)

# The fault tests at their larger sizes: SIZE=long about an hour, SIZE=full a day. Alone on the machine, one at a time.
SIZE ?= long
faults: $(VENV)/.built $(VENV)/.test
	@$(BIN)/pytest -q -p no:cacheprovider --timeout 7200 --faults $(SIZE) $(or $(ARGS),tests/faults)

# Breaks a promise at a time in a copy of the tree and sees a test turn red; ARGS names some, or is --list.
sabotage: $(VENV)/.built $(VENV)/.test
	@$(BIN)/python tests/faults/sabotage.py $(ARGS)

build: $(VENV)/.built

lint: $(VENV)/.built $(VENV)/.lint
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "not formatted: run make format" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/codespell

format: $(VENV)/.lint
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.built $(VENV)/.bench $(VENV)/.peers
	@$(BIN)/python -m bench $(ARGS)

# The time of each stage of an event's path, alone on one thread.
bench-micro: $(VENV)/.built $(VENV)/.test $(VENV)/.bench
	@$(BIN)/python -m pytest -q -p no:cacheprovider --timeout 600 --benchmark-columns=min,median,rounds \
	--benchmark-sort=name $(or $(ARGS),bench/micro)

# Instructions an event costs, stage by stage, against bench/budget.toml; ARGS=--record renews that.
guard: $(VENV)/.built
	@$(BIN)/python -m bench.guard $(ARGS)

# Where the CPU time of an event goes, and the C of each line of the compiled modules: build/profile.
profile: $(VENV)/.built $(VENV)/.bench $(VENV)/.profile
	@$(BIN)/python -m bench.profile $(ARGS)
	@mkdir -p build/profile/annotate
	@for each in $$(find core plugins -name '*.pyx'); do name=build/profile/annotate/$$(basename $$each .pyx); \
	$(BIN)/cython -3 --annotate -I core -o $$name.c $$each && rm $$name.c; done

# Compiled modules under the address, undefined-behaviour and leak sanitizers, built beside the normal ones: their tests,
# then damaged frames (make asan SIZE=long for two million and more).
asan: SIZE := quick
asan: $(VENV)/.built $(VENV)/.test
	@TAPEBUS_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	@PYTHONPATH=build/asan/lib PYTHONMALLOC=malloc TAPEBUS_SANITIZE=1 \
	ASAN_OPTIONS=detect_leaks=1:leak_check_at_exit=0 LSAN_OPTIONS=suppressions=tests/lsan.supp \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$($(or $(CC),gcc) -print-file-name=libasan.so)" \
	$(BIN)/pytest -q -p no:cacheprovider --timeout 7200 --faults $(SIZE) \
	$(or $(wildcard $(COMPILED:%=tests/test_%*.py)),$(error no tests)) tests/faults/test_fuzz_frames.py $(ARGS)

# The wheel, installed alone: compiled modules, plugins and command are all inside.
wheel: $(VENV)/.built
	@rm -rf dist build/wheel
	@$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@$(PIP) --no-deps --target build/wheel dist/tapebus-*.whl
	@cd build/wheel && PYTHONPATH=. ../../$(BIN)/python ../../.ci/check_wheel.py

# The versions of all dependencies with the hashes of their files. It names no place to get them from.
lock: $(VENV)/.built
	@$(PIP) pip-tools
	@{ echo "# The tested versions with the hashes of their files: pip install --require-hashes -r requirements.lock"; \
	echo "# Renewed by: make lock"; \
	$(BIN)/pip-compile --quiet --upgrade --generate-hashes --strip-extras --all-extras --no-emit-index-url \
	--no-emit-trusted-host --no-emit-find-links --no-annotate --no-header --output-file - pyproject.toml; \
	} >requirements.lock.new && mv requirements.lock.new requirements.lock

# Whether pip accepts the lock file as it stands.
lock-check: $(BIN)/python
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --dry-run --ignore-installed --only-binary :all: \
	--require-hashes --requirement requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info core/*.egg-info plugins/*.egg-info examples/*/build examples/*/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f core/tapebus/*.so core/tapebus/*.c
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python=$$(.ci/find-python) && echo "tapebus: making $(VENV) with $$python" && "$$python" -m venv $(VENV)

# An editable install does not rebuild when a source changes; this stamp does.
$(VENV)/.built: $(BIN)/python pyproject.toml setup.py $(SOURCES)
	@echo "tapebus: installing dependencies and compiling (a minute or so the first time)"
	@$(PIP) 'setuptools>=77' 'Cython>=3.1,<4' wheel
	@rm -rf *.egg-info core/*.egg-info
	@$(PIP) --no-build-isolation --editable .
	@rm -rf *.egg-info
	@touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.bench $(VENV)/.profile: $(VENV)/.%: $(BIN)/python pyproject.toml
	@$(GROUP) $* >$@.txt
	@$(PIP) --requirement $@.txt
	@touch $@

# What the benchmark compares with, each by itself: one that is not to be had on this machine is skipped in the table.
$(VENV)/.peers: $(BIN)/python pyproject.toml
	@{ $(GROUP) peers; $(GROUP) peers-alone | sed 's/$$/ --no-deps/'; } | while read -r each; do \
	$(PIP) --only-binary :all: $$each </dev/null 2>$@.log || \
	echo "tapebus: $$each cannot be installed here, the benchmark leaves it out ($@.log)" >&2; done
	@touch $@
