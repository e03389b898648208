#!/bin/sh
# Runs every test, the slow ones too, on each supported Python, each in an environment of its own (.venv-3.12 ...).
#
#   .ci/test_all.sh VERSION...
#
# pythons.sh says where interpreters are looked for. One that is missing is named and skipped; it is an error when all are.
set -u

. "$(dirname "$0")/pythons.sh"

outcome=
status=0
ran=0
compiled=
for version in "$@"; do
    if ! find_python "$version"; then
        printf '\n== Python %s: not found, skipped\n' "$version"
        outcome="$outcome $version skipped (not found),"
        continue
    fi
    printf '\n== Python %s\n' "$version"
    ran=1
    if $enter .ci/setup.sh ".venv-$version" test "$python" &&
        $enter ".venv-$version/bin/python" -m pytest -m "not system"; then
        outcome="$outcome $version passed,"
        [ -n "$enter" ] || compiled=.venv-$version/bin/python
    else
        outcome="$outcome $version FAILED,"
        status=1
    fi
done
# The routing loop's readable twin, which is what runs where nothing could be compiled.
if [ -n "$compiled" ]; then
    printf '\n== without the compiled routing loop\n'
    if BROKERD_PURE=1 "$compiled" -m pytest; then
        outcome="$outcome without the compiled loop passed,"
    else
        outcome="$outcome without the compiled loop FAILED,"
        status=1
    fi
fi
printf '\ntest-all:%s\n' "${outcome%,}"
[ "$ran" = 1 ] || status=1
exit "$status"
