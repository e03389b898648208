#!/bin/sh
# Runs every test, the slow ones too, on each supported Python, each in an environment of its own (.venv-3.12 ...).
#
#   .ci/test_all.sh VERSION...
#
# An interpreter is found by its name, among those of pyenv, or in TEST_ROOT: a directory with another system, which is
# entered by chroot (as root; CONTRIBUTING.md says how to make one). One that is missing is named and skipped; it is an
# error when all are.
set -u

runs() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1; }

find_python() {
    if runs "python$1" "$1"; then
        printf '%s\n' "python$1"
        return
    fi
    for candidate in "$(pyenv root 2>/dev/null)/versions/$1".*/bin/python; do
        if runs "$candidate" "$1"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# Runs a command in TEST_ROOT, with this checkout at its own path. The mounts end with the command.
in_root() {
    mkdir -p "$TEST_ROOT$PWD"
    unshare --mount --propagation private sh -euc '
        root=$1 checkout=$2
        shift 2
        mount --rbind /proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount --bind "$checkout" "$root$checkout"
        exec chroot "$root" /usr/bin/env --chdir="$checkout" "$@"
    ' in_root "$TEST_ROOT" "$PWD" "$@"
}

outcome=
status=0
ran=0
compiled=
for version in "$@"; do
    enter=
    if python=$(find_python "$version"); then
        :
    elif [ -n "${TEST_ROOT:-}" ] && [ -x "$TEST_ROOT/usr/bin/python$version" ]; then
        enter=in_root
        python=python$version
    else
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
