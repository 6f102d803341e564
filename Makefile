.PHONY: check format test

LIBRARIES := packages/kernels/src/ packages/architecture/src/ packages/data_handler/src/
APPS := packages/training/src/ packages/inference/src/ packages/eval/src/ packages/deployer/src/

check: ## what CI and pre-commit run before the tests
	uv run ruff check .
	uv run ruff format --check .
	uv run mypy --strict $(LIBRARIES)
	uv run mypy $(APPS)

format:
	uv run ruff check --fix .
	uv run ruff format .

test:
	uv run pytest
