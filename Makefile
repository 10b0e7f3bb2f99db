# make        lint, types and tests          make demo      classify a few photographs
# make quick  the tests that are fast        make gallery   make the pictures of the README
# make fix    let ruff repair what it can    make clean     remove everything that was made
# make gpu    test and measure a GPU
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.runtime-installed
DEV := .venv/.dev-installed

all: lint types test

demo: $(RUNTIME)
	$(BIN)/python -m apm.cli.demo

gallery: $(DEV)
	$(BIN)/python -m apm.cli.gallery

# A process a core, of one thread each unless OMP_NUM_THREADS says otherwise: most tests are too small for more. What is
# compiled is kept, whatever the shell says: else each of the processes, and each that a test starts, does it again.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(DEV)
	$(PYTEST)

quick: $(DEV)
	$(PYTEST) --quiet -m "not slow"

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The three folders are one package only once installed: mypy sees them through links laid the same way.
types: $(DEV)
	rm -rf build/types
	mkdir -p build/types/apm
	ln -s $(addprefix $(CURDIR)/,$(filter-out %/__pycache__,$(wildcard apm/*)) cli benchmarks) build/types/apm/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

fix: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-speed: $(RUNTIME)
	$(BIN)/python -m apm.benchmarks.speed

gpu: $(DEV)
	$(BIN)/python -m apm.benchmarks.speed gpu

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is younger than pyproject.toml when that very file was installed: a second run installs nothing.
$(RUNTIME): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(DEV): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(RUNTIME) $@

.PHONY: all demo gallery test quick lint types fix bench-speed gpu clean
