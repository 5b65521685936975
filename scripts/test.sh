#!/bin/sh
# Make the environments if needed and pass all checks: format, lint, types, tests.
. "$(dirname "$0")/env.sh"
need dev
need_engines
ruff format --check .
ruff check .
mypy
python -m pytest -n auto --dist loadfile "$@"
