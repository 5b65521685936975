# Sourced by the other scripts: makes environments in the project's folder.
# PYTHON chooses the interpreter (3.10 to 3.13).
set -eu
cd "$(dirname "$0")/.."

# .venv with one of this project's extras.
need() {
    extra=$1
    # What was installed, and from which definition, so that a second run installs nothing.
    mark=".venv/.installed-$extra"
    if [ ! -f "$mark" ] || [ pyproject.toml -nt "$mark" ] || [ constraints.txt -nt "$mark" ]; then
        echo "installing eplb-dump[$extra] into .venv ..."
        [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
        install .venv -c constraints.txt -e ".[$extra]"
        touch "$mark"
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}

# .venv-engines with unmodified vLLM and SGLang, and the writer as an engine's image has it.
need_engines() {
    mark=.venv-engines/.installed
    wanted=tests/engines
    if [ ! -f "$mark" ] || [ pyproject.toml -nt "$mark" ] || [ "$wanted/requirements.txt" -nt "$mark" ] ||
        [ "$wanted/no-deps.txt" -nt "$mark" ]; then
        echo "installing vLLM and SGLang into .venv-engines (2.5 GB, or 7 GB if torch includes CUDA) ..."
        [ -x .venv-engines/bin/python ] || "${PYTHON:-python3}" -m venv .venv-engines
        install .venv-engines -r "$wanted/requirements.txt"
        install .venv-engines --no-deps -r "$wanted/no-deps.txt" -e .
        touch "$mark"
    fi
}

# A Chromium for the tests of the report.
need_browser() {
    for name in "${CHROME:-}" chromium chromium-browser google-chrome; do
        if [ -n "$name" ] && command -v "$name" >/dev/null; then
            return 0
        fi
    done
    need_packages chromium
}

# Prometheus, promtool and node_exporter for the tests of the metrics, zsh for those of shell completion.
need_programs() {
    missing=
    for name in prometheus prometheus-node-exporter zsh; do
        command -v "$name" >/dev/null || missing="$missing $name"
    done
    [ -z "$missing" ] || need_packages $missing
}

# Without these packages some tests are skipped, and pytest's last lines say so.
need_packages() {
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "installing $* ..."
        { apt-get update && apt-get install -y --no-install-recommends "$@"; } >/dev/null 2>&1 || true
    fi
}

install() {
    environment=$1
    shift
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
