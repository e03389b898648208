#!/bin/sh
# Runs the tests of the library on each of its Pythons, where brokerd-client alone is installed, each in an environment of
# its own (.venv-client-3.9 ...). The broker runs on the Python of VENV.
#
#   .ci/test_client.sh VENV VERSION...
#
# pythons.sh says where interpreters are looked for. The broker of one in TEST_ROOT runs there too, in .venv-3.14 and so on.
# One that is missing is named and skipped; it is an error when all are. PYTEST_ARGUMENTS are passed on.
set -u

own_broker=$PWD/$1/bin/python
shift

. "$(dirname "$0")/pythons.sh"

install() {
    $enter test -x "$1/bin/python" || $enter "$2" -m venv "$1" || return 1
    $enter "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
        --requirement .ci/requirements-client.txt </dev/null &&
        $enter "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --force-reinstall ./client </dev/null
}

outcome=
status=0
ran=0
for version in "$@"; do
    if ! find_python "$version"; then
        printf '\n== the library on Python %s: not found, skipped\n' "$version"
        outcome="$outcome $version skipped (not found),"
        continue
    fi
    printf '\n== the library on Python %s\n' "$version"
    ran=1
    venv=.venv-client-$version
    broker=$own_broker
    [ -z "$enter" ] || broker=$PWD/.venv-$version/bin/python
    # Not python -m pytest, which would find the package brokerd of this directory.
    # shellcheck disable=SC2086
    if { [ -z "$enter" ] || $enter .ci/setup.sh ".venv-$version" test "$python"; } &&
        install "$venv" "$python" &&
        $enter env BROKERD_BROKER_PYTHON="$broker" PYTHONPATH="$PWD/tests/support/remote_broker" "$venv/bin/pytest" \
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
