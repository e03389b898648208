#!/bin/sh
# Makes a virtual environment ready and installs this checkout into it, editable; says nothing when nothing is to do.
#
#   .ci/setup.sh VENV EXTRA [PYTHON]
#
# VENV:   the environment's directory, made where it does not exist.
# EXTRA:  "run" for what the commands need, "test" for what the checks need too.
# PYTHON: the interpreter to build it from; without it the first of a few names that is 3.11 or later.
#
# What is installed is what the locks beside this file say, every file by its hash. A Python that they are not for, or
# an index that does not have their versions, gets what pyproject.toml allows, and says so; with LOCKED=1 it is an error.
# UNLOCKED=1 asks for what pyproject.toml allows. Everything else that goes wrong ends the installation: a file that is
# not the one that was locked above all.
#
# A stamp file inside VENV remembers what was installed and for which checkout: a second call does nothing until
# pyproject.toml, setup.py, a lock, or a file that is compiled, changes, or the checkout is moved. Where only such files
# have changed, they are compiled and nothing is installed.
set -eu

venv=$1
extra=$2
python=${3:-}

say() { printf '%s\n' "$*" >&2; }

[ -z "${UNLOCKED:-}" ] || [ -z "${LOCKED:-}" ] || { say "LOCKED and UNLOCKED are both set"; exit 1; }

# Some names are there and do not run: pyenv's, for a version that is not switched on.
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    for name in ${PYTHON:-} python3 python3.15 python3.14 python3.13 python3.12 python3.11 python; do
        if new_enough "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    say "brokerd needs Python 3.11 or later, and none was found (tried: ${PYTHON:-} python3, python3.11 to python3.15, python)."
    say "Install one, or name it:  make PYTHON=/path/to/python3 ..."
    return 1
}

# A checkout that was moved, or a Python that was removed, leaves an environment that only looks like one.
if [ -e "$venv" ] && ! new_enough "$venv/bin/python"; then
    say "$venv no longer works; making it again"
    rm -rf "$venv"
fi

if [ ! -e "$venv" ]; then
    [ -n "$python" ] || python=$(find_python)
    if ! "$python" -m venv "$venv" >"$venv.log" 2>&1; then
        cat "$venv.log" >&2
        rm -rf "$venv" "$venv.log"
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        say ""
        say "'$python -m venv' failed. Debian and Ubuntu keep a part of it in a package of its own:"
        say "    sudo apt-get install python3-venv      (or python$version-venv)"
        exit 1
    fi
    rm -f "$venv.log"
fi

# Says whether a file is newer than a stamp.
newer() {
    stamp=$1
    shift
    for source; do
        if [ -e "$source" ] && [ "$source" -nt "$stamp" ]; then
            return 0
        fi
    done
    return 1
}

# Compiles what has changed; the rest of an installation in place is as it was.
compile() {
    say "compiling what has changed ..."
    "$venv/bin/python" -W ignore setup.py --quiet build_ext --inplace \
        --build-lib "$venv/build/lib" --build-temp "$venv/build/temp" </dev/null || exit 1
    touch "$1"
}

current() {
    [ -f "$1" ] || return 1
    installed=$(cat "$1")
    case $installed in
        "$PWD") [ -z "${UNLOCKED:-}" ] || return 1 ;;
        "not locked: $PWD") [ -z "${LOCKED:-}" ] || return 1 ;;
        *) return 1 ;;
    esac
    ! newer "$1" pyproject.toml setup.py .ci/requirements-*.txt || return 1
    # shellcheck disable=SC2046 - they are several
    if newer "$1" brokerd/core/compiled.py brokerd/*/*.pyx brokerd/*/*/*.pyx brokerd/core/*.pxd \
        $(printf '%s\n' brokerd/core/*.pxd | sed 's/pxd$/py/'); then
        # Only the locked environment has what compiles.
        [ "$installed" = "$PWD" ] || return 1
        compile "$1"
    fi
}

test_stamp=$venv/.installed-test
run_stamp=$venv/.installed-run
if current "$test_stamp" || { [ "$extra" = run ] && current "$run_stamp"; }; then
    exit 0
fi

pip() { "$venv/bin/python" -m pip "$@" </dev/null; }
pip_install() { pip install --quiet --disable-pip-version-check --no-input "$@"; }

# Returns 1 where the locks don't fit: the Python is another one, or the index lacks a version. Ends everything otherwise.
install_locked() {
    if ! "$venv/bin/python" -c '
import sys
sys.exit(not (sys.implementation.name == "cpython" and (3, 11) <= sys.version_info[:2] <= (3, 15)))
'; then
        say "the locks are for CPython 3.11 to 3.15"
        return 1
    fi
    log=$venv/.locked.log
    if pip_install --require-hashes "$@" >"$log" 2>&1; then
        rm -f "$log"
        return 0
    fi
    cat "$log" >&2
    if grep -q 'DO NOT MATCH THE HASHES' "$log"; then
        say "a package is not the one that is locked in .ci/requirements-*.txt; UNLOCKED=1 installs what is there instead"
    elif grep -q 'No matching distribution found for [^ ]*==' "$log"; then
        return 1
    fi
    exit 1
}

say "installing into $venv, which takes a minute or two ..."
# What they say of it is over.
rm -f "$test_stamp" "$run_stamp"
if [ "$extra" = test ]; then
    wanted='.[test]' stamp=$test_stamp
    set -- --requirement .ci/requirements-test.txt
else
    wanted=. stamp=$run_stamp
    set -- --requirement .ci/requirements-run.txt --requirement .ci/requirements-build.txt
fi
if [ -z "${UNLOCKED:-}" ] && install_locked "$@"; then
    pip_install --no-deps --no-build-isolation --editable .
    printf '%s\n' "$PWD" >"$stamp"
elif [ -n "${LOCKED:-}" ]; then
    say "LOCKED is set, and what is locked can't be installed; without it, what pyproject.toml allows is"
    exit 1
else
    say "*** NOT LOCKED: installing what pyproject.toml allows, of which no hash is known (LOCKED=1 refuses that) ***"
    pip_install --editable "$wanted"
    printf 'not locked: %s\n' "$PWD" >"$stamp"
fi
