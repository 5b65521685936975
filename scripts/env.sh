# Sourced by the other scripts: makes .venv in the project's folder and installs an extra into it.
# PYTHON chooses the interpreter (3.10 to 3.13).
set -eu
cd "$(dirname "$0")/.."

need() {
    extra=$1
    # What was installed, and from which definition, so that a second run installs nothing.
    mark=".venv/.installed-$extra"
    if [ ! -f "$mark" ] || [ pyproject.toml -nt "$mark" ] || [ constraints.txt -nt "$mark" ]; then
        [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
        echo "installing eplb-dump[$extra] into .venv ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -c constraints.txt -e ".[$extra]"
        touch "$mark"
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}
