#!/bin/sh
# Make the environment if needed and pass all checks: format, lint, types, tests.
. "$(dirname "$0")/env.sh"
need dev
ruff format --check .
ruff check .
mypy
python -m pytest -n auto --dist loadfile "$@"
