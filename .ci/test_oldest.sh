#!/bin/sh
# Runs the tests on Python 3.11 with the oldest versions that pyproject.toml allows of what it names, what builds
# included, in an environment of its own.
#
#   .ci/test_oldest.sh TOOLS_VENV [PYTEST ARGUMENT]...
set -eu

uv=$PWD/$1/bin/uv
shift
venv=.venv-oldest
for python in python3.11 "$(pyenv root 2>/dev/null)"/versions/3.11.*/bin/python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
        found=$python
        break
    fi
done
[ -n "${found:-}" ] || { echo "test-oldest needs Python 3.11" >&2; exit 1; }

"$found" -m venv --clear "$venv"
oldest=$(mktemp)
build=$(mktemp)
trap 'rm -f "$oldest" "$build"' EXIT
"$found" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["build-system"]["requires"]))
' >"$build"
"$uv" pip compile --quiet --resolution lowest-direct --python-version 3.11 --extra test --no-annotate --no-header \
    --output-file "$oldest" pyproject.toml "$build" </dev/null
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --requirement "$oldest" </dev/null
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation --editable . </dev/null
echo "oldest: $(grep -c == "$oldest") packages:" $(cat "$oldest")
"$venv/bin/python" -m pytest "$@"
