#!/bin/sh
# Make the environments if needed and pass all checks: format, lint, types, spelling, documentation, tests.
#
#   sh scripts/test.sh                    everything
#   sh scripts/test.sh lint               format, lint, types, spelling, documentation
#   sh scripts/test.sh unit               the tests of tests/unit; likewise process, engines, browser
#   sh scripts/test.sh PATH OPTION ...    what pytest takes
. "$(dirname "$0")/env.sh"

lint() {
    ruff format --check .
    ruff check .
    mypy
    codespell
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict # not --quiet, which hides warnings from --strict
}

# A file per worker: the fixtures of a file are made once.
tests() {
    python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
}

need dev
case "${1:-all}" in
all)
    # The engines' environment takes minutes to install, most of them waiting for the disk.
    (need_engines) &
    engines=$!
    need_browser
    need_programs
    lint
    wait "$engines"
    tests
    ;;
lint)
    lint
    ;;
unit | process)
    suite=$1
    [ "$suite" = unit ] || need_programs
    shift
    tests "tests/$suite" "$@"
    ;;
engines)
    need_engines
    shift
    tests tests/engines "$@"
    ;;
browser)
    need_browser
    shift
    tests tests/browser "$@"
    ;;
*)
    python -m pytest "$@"
    ;;
esac
