# `make run`: the quickstart, from nothing to the report.   `make test`: every test that needs no service.
# `make services`: what the tests marked `services` need, installed; `make test PYTEST_ARGS="-m services -n 0"` runs them.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

SERVICES := $(VENV)/.services-installed

.PHONY: run test check services clean

run: $(STAMP)
	@$(BIN)/stillhouse run quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and pinned, or a dependency's plain `torch` could bring another build.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "stillhouse needs Python 3.11, 3.12 or 3.13: install one, or say make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

services: $(SERVICES)

# The extras, an S3 server in an environment of its own, and Debian's packages, for which it takes root.
$(SERVICES): $(STAMP) requirements-services.lock requirements-moto.lock
	$(BIN)/python -m pip install --quiet -r requirements-services.lock
	test -x $(VENV)-moto/bin/python || $(PYTHON) -m venv $(VENV)-moto
	$(VENV)-moto/bin/python -m pip install --quiet -r requirements-moto.lock
	@if test -x /usr/bin/chromium && ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium postgresql iproute2 >/dev/null; \
	else echo "chromium and postgresql are not both installed, and to install them takes root and apt-get" >&2; exit 1; fi
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-moto .stillhouse
