#!/bin/sh
# Runs the tests of the library on each of its Pythons, where brokerd-client alone is installed, each in an environment of
# its own (.venv-client-3.9 ...). The broker runs on the Python of VENV.
#
#   .ci/test_client.sh VENV VERSION...
#
# An interpreter is found by its name or among those of pyenv. One that is missing is named and skipped; it is an error when
# all are. PYTEST_ARGUMENTS are passed on.
set -u

broker=$PWD/$1/bin/python
shift

runs() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1; }

find_python() {
    for candidate in "python$1" "$(pyenv root 2>/dev/null)/versions/$1".*/bin/python; do
        if runs "$candidate" "$1"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

install() {
    [ -x "$1/bin/python" ] || "$2" -m venv "$1" || return 1
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
        --requirement .ci/requirements-client.txt </dev/null &&
        "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --force-reinstall ./client </dev/null
}

outcome=
status=0
ran=0
for version in "$@"; do
    if ! python=$(find_python "$version"); then
        printf '\n== the library on Python %s: not found, skipped\n' "$version"
        outcome="$outcome $version skipped (not found),"
        continue
    fi
    printf '\n== the library on Python %s\n' "$version"
    ran=1
    venv=.venv-client-$version
    # Not python -m pytest, which would find the package brokerd of this directory.
    # shellcheck disable=SC2086
    if install "$venv" "$python" &&
        BROKERD_BROKER_PYTHON=$broker PYTHONPATH=$PWD/tests/support/remote_broker "$venv/bin/pytest" \
            tests/client tests/wire tests/test_address.py tests/test_errors.py ${PYTEST_ARGUMENTS:-}; then
        outcome="$outcome $version passed,"
    else
        outcome="$outcome $version FAILED,"
        status=1
    fi
done
printf '\ntest-client:%s\n' "${outcome%,}"
[ "$ran" = 1 ] || status=1
exit "$status"
