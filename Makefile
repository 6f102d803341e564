.PHONY: check format test

check: ## what CI and pre-commit run before the tests
	uv run ruff check packages/
	uv run ruff format --check packages/
	uv run mypy packages/architecture/src/

format:
	uv run ruff check --fix packages/
	uv run ruff format packages/

test:
	uv run pytest
