# Finds the Pythons of the tests, and runs commands where they are. It is read by test_all.sh and test_client.sh.
#
# An interpreter is found by its name, among those of pyenv, or in TEST_ROOT: a directory with another system, which is
# entered by chroot (as root; CONTRIBUTING.md says how to make one).

runs() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1; }

# Sets python to the interpreter of a version, and enter to what has to stand before its commands.
find_python() {
    enter=
    for python in "python$1" "$(pyenv root 2>/dev/null)/versions/$1".*/bin/python; do
        if runs "$python" "$1"; then
            return
        fi
    done
    python=python$1
    enter=in_root
    [ -n "${TEST_ROOT:-}" ] && [ -x "$TEST_ROOT/usr/bin/$python" ]
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
