# make run · make test · make bench · make lint, each with its own set-up.

BIN := .venv/bin
SETUP := pyproject.toml constraints.txt infra/install.sh

.PHONY: run test lint bench clean
.DELETE_ON_ERROR:

run: .venv/.installed-run
	$(BIN)/peftflow run recipes/quickstart.yaml

test: .venv/.installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# make bench QUICK=--quick for the short form of each.
bench: .venv/.installed-bench
	@failed=; for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script $(QUICK)"; $(BIN)/python $$script $(QUICK) || failed="$$failed $$script"; done; \
	  test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean:
	rm -rf .venv .peftflow build *.egg-info

.venv/.installed-%: $(SETUP)
	infra/install.sh $*
