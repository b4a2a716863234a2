# Two commands: `make demo` and `make test`. Both create .venv if it is missing.
PYTHON ?= python3
SIZE ?= default
OUTPUT ?= runs/$(if $(filter default,$(SIZE)),demo,$(SIZE))

# Modules are compiled when they are first imported, not during the installation. The results are kept even where this
# variable forbids it: otherwise each of hundreds of processes would compile torch again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test pytest integration-test install-test lint style types docs package venv clean

demo: .venv/demo
	.venv/bin/ctclip demo --size $(SIZE) --output $(OUTPUT)

# Style first, because it takes seconds; types in parallel with the tests, because they take a minute.
test: style
	$(MAKE) --jobs 2 types pytest

# Two processes of one thread; each file is run by one of them. The order is that of the folders: the long files come first,
# so that neither process ends minutes before the other.
RUN = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/install

pytest: .venv/installed
	$(RUN) $(if $(ALL),,-m "not integration") $(PYTEST)

# Tests that start ranks, Slurm, services, notebooks and the commands of the documentation; `make test ALL=1` includes them.
integration-test: .venv/installed
	$(RUN) -m integration $(PYTEST)

# The wheel in new environments, run by another user; three minutes.
install-test: .venv/installed
	.venv/bin/python -m pytest tests/install

PROSE = README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md $(shell find docs -name '*.md')

lint: style types

style: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell
	.venv/bin/proselint --config .proselintrc.json check $(PROSE)

types: .venv/installed
	.venv/bin/mypy

# Build sdist and wheel into dist/, and check their descriptions.
package: .venv/installed
	rm -rf dist
	.venv/bin/python -m build
	.venv/bin/twine check --strict dist/*

# Build the site in runs/site; a broken link is an error. The warning concerns a MkDocs version that is not released yet.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

venv: .venv/installed

# Packages for the demo, then those that only tests and documentation need. torch is installed first, separately, so that
# no other package can require another version. Python compiles a module when it is first imported; compiling all modules
# here would take two thirds of the installation time.
INSTALL = .venv/bin/python -m pip install -qq --no-compile

.venv/demo: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -qq --upgrade pip setuptools
	$(INSTALL) torch==2.13.0
	$(INSTALL) --constraint constraints.txt --editable ".[train]"
	touch .venv/demo

.venv/installed: .venv/demo
	$(INSTALL) --constraint constraints.txt --editable ".[dev]"
	touch .venv/installed

clean:
	rm -rf .venv runs dist build
