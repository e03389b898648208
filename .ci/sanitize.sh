#!/bin/sh
# Builds the compiled modules with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of this checkout, and runs
# the everyday tests on it, some 15 minutes. Needs gcc with both sanitizers (Debian: gcc, libc6-dev).
#
#   .ci/sanitize.sh VENV [PYTEST ARGUMENT]...
#
# Nothing instrumented is left in the checkout. That the sanitizers are at work is shown first, by mistakes planted in
# a module that does nothing else.
set -eu

python=$PWD/$1/bin/python
shift
copy=$PWD/build/sanitize
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
say() { printf 'sanitize: %s\n' "$*"; }

command -v gcc >/dev/null || { say "gcc is needed, with its sanitizers"; exit 1; }
for library in libasan.so libubsan.so libstdc++.so.6; do
    path=$(gcc -print-file-name=$library)
    # gcc gives a name back as it is where it has no such file.
    [ "$path" != "$library" ] || { say "gcc has no $library"; exit 1; }
    preload=${preload:+$preload }$path
done

rm -rf "$copy"
mkdir -p "$copy"
cp -R .ci benchmarks brokerd client config docs systemd tests \
    .dockerignore CHANGELOG.md Dockerfile LICENSE Makefile README.md pyproject.toml setup.py "$copy"
cd "$copy"
find . '(' -name '*.so' -o -name '_*_c.c' -o -name __pycache__ ')' -prune -exec rm -rf {} +

CFLAGS="$flags" LDFLAGS="$flags" "$python" -W ignore setup.py --quiet build_ext --inplace
for module in brokerd/core/*.so brokerd/net/handshake/*.so; do
    [ -e "$module" ] || { say "the modules could not be compiled"; exit 1; }
    nm -D "$module" | grep -q __asan_report || { say "$module is not instrumented"; exit 1; }
    nm -D "$module" | grep -q __ubsan_handle || { say "$module is not instrumented"; exit 1; }
done

# What Python itself leaks at its end is its own business; its small objects must not come out of one large block. Every process
# that is started writes what AddressSanitizer finds into a file of its own, for a test may well expect that a broker dies; UBSan
# knows no such file once the other is there: it ends the process, and a test with it. What is freed is kept
# out of use up to 64 MiB, not the usual 256: the broker's memory under attack is held to its bound here too.
reports=$copy/reports
mkdir "$reports"
instrumented() {
    env LD_PRELOAD="$preload" PYTHONMALLOC=malloc PYTHONPATH="$copy:$copy/client" \
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=1:quarantine_size_mb=64:log_path=$reports/asan" \
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1" PATH="$copy/bin:$PATH" "$@"
}
# curl hangs before its first line when AddressSanitizer is loaded into it; it runs as it is.
mkdir bin
if curl=$(command -v curl); then
    printf '#!/bin/sh\nunset LD_PRELOAD\nexec "%s" "$@"\n' "$curl" >bin/curl
    chmod +x bin/curl
fi

mkdir planted
cat >planted/planted.c <<'END'
#include <Python.h>
static PyObject *overflow(PyObject *self, PyObject *arguments) {
    volatile size_t size = 8;
    volatile char *bytes = malloc(size);
    bytes[PyTuple_GET_SIZE(arguments) + 8] = 1;
    free((void *)bytes);
    Py_RETURN_NONE;
}
static PyObject *undefined(PyObject *self, PyObject *arguments) {
    volatile int number = 0x7fffffff;
    return PyLong_FromLong(number + 1 + (int)PyTuple_GET_SIZE(arguments));
}
static PyMethodDef methods[] = {
    {"overflow", overflow, METH_VARARGS, NULL}, {"undefined", undefined, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "planted", NULL, -1, methods};
PyMODINIT_FUNC PyInit_planted(void) { return PyModule_Create(&module); }
END
# shellcheck disable=SC2086 - they are several
gcc $flags -shared -fPIC -I"$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
    -o planted/planted.so planted/planted.c
for mistake in "overflow heap-buffer-overflow" "undefined signed.integer.overflow"; do
    if (cd planted && instrumented "$python" -c "import planted; planted.${mistake% *}()" >output 2>&1); then
        say "a planted mistake went unnoticed: ${mistake% *}"
        exit 1
    fi
    noticed=$(cat "$reports"/* planted/output 2>/dev/null | grep -m 1 -o "${mistake#* }") ||
        { cat planted/output; say "a planted mistake was not told"; exit 1; }
    say "noticed a planted mistake: $noticed"
    rm -f "$reports"/*
done

instrumented "$python" -c '
import sys
from brokerd.core import routing, _routing_c
assert routing.NAME == "compiled" and routing.feed is _routing_c.feed, routing.NAME
assert _routing_c.__file__.startswith(sys.argv[1]), _routing_c.__file__
print("sanitize: running", _routing_c.__file__.removeprefix(sys.argv[1] + "/"))
' "$copy"
# What is left out sets the clock, with a library that hangs beside AddressSanitizer: both take the place of the C library's calls.
[ $# -gt 0 ] || set -- tests --deselect tests/outages/test_exhausted.py::test_clock_set_forward_and_back_disconnects_no_client
status=0
# More of what chance makes than on other days, where both loops are compared.
BROKERD_SEEDS=300 BROKERD_FUZZ_FACTOR=3 instrumented "$python" -m pytest -p no:cacheprovider -q "$@" || status=$?
for report in "$reports"/*; do
    [ -e "$report" ] || continue
    cat "$report"
    say "found something, see above: $report"
    exit 1
done
say "nothing found by the sanitizers"
[ $status = 0 ] || { say "but tests failed"; exit $status; }
cd ../..
rm -rf "$copy"
