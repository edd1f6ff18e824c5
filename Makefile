# `make` lists what there is to do. Everything that it makes lies in this folder: .venv, .stepfast and caches.
.POSIX:
.SUFFIXES:
.NOTPARALLEL:

VENV = .venv
PYTHON =
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

.PHONY: help
help: ## List these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1	\2/p' Makefile | expand -t 10

.PHONY: setup
setup: $(VENV)/demo.stamp ## Make .venv, with what the demo needs (PYTHON=... chooses the interpreter)

.PHONY: demo
demo: $(VENV)/demo.stamp ## Run the bundled pipeline on a small repository (LIVE=1: on Claude, with your key)
	@$(BIN)/stepfast demo $(if $(filter 1,$(LIVE)),--live)

.PHONY: shop
shop: $(VENV)/dev.stamp ## Start examples/django_shop with everything it needs, until Ctrl-C
	@$(BIN)/python examples/start.py django_shop

.PHONY: desk
desk: $(VENV)/dev.stamp ## Start examples/flask_desk with everything it needs, until Ctrl-C
	@$(BIN)/python examples/start.py flask_desk

.PHONY: test
test: $(VENV)/dev.stamp ## Run all tests, two at once, each on servers of its own (ARGS=... goes to pytest)
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

.PHONY: lint
lint: $(VENV)/dev.stamp ## Check style, format and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/dev.stamp ## Write the format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: types
types: $(VENV)/dev.stamp ## Check types
	@$(BIN)/mypy

.PHONY: enqueue
enqueue: $(VENV)/dev.stamp ## Measure what starting a run costs a host
	@$(BIN)/python bench/enqueue.py

.PHONY: bench
bench: $(VENV)/dev.stamp ## Measure Stepfast beside its peers, in turns (10 minutes; ARGS="--peers celery", or --help)
	@$(BIN)/python bench/against.py $(ARGS)

.PHONY: latency
latency: $(VENV)/dev.stamp ## Measure how long runs wait for us, and what 1,000 that wait for a model cost (7 minutes)
	@$(BIN)/python bench/latency.py
	@$(BIN)/python bench/waiting.py

.PHONY: pictures
pictures: $(VENV)/dev.stamp ## Take the documents' pictures of the example's pages anew
	@PICTURES=docs/images $(BIN)/python -m pytest tests/test_web_examples.py -k shop

.PHONY: histories
histories: $(VENV)/dev.stamp ## Prove the rules over 2,000 random histories of runs (20 minutes)
	@HISTORIES=2000 $(BIN)/python -m pytest -s tests/test_histories.py tests/test_hammer.py tests/test_transactions.py tests/test_poison.py --timeout=3600

.PHONY: crashtest
crashtest: $(VENV)/dev.stamp ## Kill workers at every named point of the bundled pipeline, on both brokers (ARGS=... goes to both)
	@$(BIN)/stepfast crashtest examples/bugfix $(ARGS)
	@$(BIN)/stepfast crashtest examples/bugfix --broker rabbitmq $(ARGS)

.PHONY: letters
letters: $(VENV)/dev.stamp ## Resume 10,000 dead letters by one command; prints the time and the peak memory (15 minutes)
	@LETTERS=10000 $(BIN)/python -m pytest -s tests/test_bulk.py

.PHONY: soak
soak: $(VENV)/dev.stamp ## Measure recovery under faults (an hour; ARGS="--part wipe --broker rabbitmq", or --help)
	@$(BIN)/python bench/soak.py $(ARGS)

.PHONY: history
history: $(VENV)/dev.stamp ## Measure whether 1,000,000 finished runs slow what runs now (10 minutes, 20 GB; ARGS="--runs 50000")
	@$(BIN)/python bench/history.py $(ARGS)

.PHONY: ci
ci: lint types test ## What CI runs

.PHONY: lock
lock: $(VENV)/dev.stamp ## Pin the newest versions that pyproject.toml allows
	@$(COMPILE) --upgrade -o requirements/base.txt pyproject.toml
	@$(COMPILE) --upgrade -o requirements/demo.txt --extra demo -c requirements/base.txt pyproject.toml
	@$(COMPILE) --upgrade -o requirements/dev.txt --group dev --all-extras -c requirements/demo.txt pyproject.toml client/pyproject.toml
	@printf '%s\n' 'celery[redis]' hiredis | $(COMPILE) --upgrade -o requirements/bench-celery.txt -
	@echo 'dbos' | $(COMPILE) --upgrade -o requirements/bench-dbos.txt -
	@printf '%s\n' langgraph langgraph-checkpoint-postgres 'psycopg[binary,pool]' | $(COMPILE) --upgrade -o requirements/bench-langgraph.txt -
	@printf '%s\n' absurd-sdk absurdctl 'psycopg[binary]' | $(COMPILE) --upgrade -o requirements/bench-absurd.txt -
	@echo 'sqlalchemy<2.1' | $(COMPILE) --upgrade --no-deps -o requirements/oldest.txt -

.PHONY: clean
clean: ## Remove what was made here, with the runs in .stepfast; refuses while something runs on them
	@python=python3; test ! -x $(BIN)/python || python=$(BIN)/python; \
	for lock in .stepfast/*.lock .stepfast/servers/*.alive .stepfast/*/*.lock .stepfast/*/servers/*.alive; do \
	  test ! -e "$$lock" || $$python -c 'import fcntl, sys; fcntl.flock(open(sys.argv[1]), 2 | 4)' "$$lock" 2>/dev/null || \
	  { echo "Something still runs on .stepfast ($$lock is locked, or not yours). End it first."; exit 1; }; \
	done
	@rm -rf .venv .venv-* .stepfast .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so that what was interrupted begins anew.
$(VENV)/demo.stamp: requirements/demo.txt pyproject.toml
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Setting up $(VENV) with $$python; this happens once." && exec "$$python" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "Stepfast needs Python 3.11 or newer with venv (Debian: python3-venv). Name one: make setup PYTHON=/its/path"; exit 1
	@$(PIP) install --require-hashes -r requirements/demo.txt
	@$(PIP) install --no-build-isolation --no-deps --editable . --editable client
	@touch $@

# The tests of the client try the oldest SQLAlchemy that it supports, too.
$(VENV)/dev.stamp: $(VENV)/demo.stamp requirements/dev.txt requirements/oldest.txt
	@echo "Adding what the tests need to $(VENV)."
	@rm -f $(VENV)/demo.stamp
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install --require-hashes --no-deps --upgrade --target $(VENV)/oldest -r requirements/oldest.txt
	@touch $(VENV)/demo.stamp $@
