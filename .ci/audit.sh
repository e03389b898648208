#!/bin/sh
# Asks the vulnerability service of the package index about every locked package.
#
#   .ci/audit.sh TOOLS_VENV
#
# Ends with 1 where something is known. Where the service can't be reached, or does not know a package, nothing is known of
# it: then it says so, and ends with 2.
set -u

report=$(mktemp)
trap 'rm -f "$report"' EXIT
status=0
for name in run build test tools; do
    lock=.ci/requirements-$name.txt
    # --strict: a package that could not be looked up is no clean one.
    if "$1/bin/pip-audit" --strict --progress-spinner off --require-hashes --disable-pip --requirement "$lock" >"$report" 2>&1; then
        echo "$lock: $(tail -n 1 "$report")"
    elif grep -q '^Found [0-9]' "$report"; then
        echo "$lock:"
        cat "$report"
        status=1
    else
        grep . "$report" | tail -n 1
        echo "$lock: NOT AUDITED. The vulnerability service can't be reached from here, or does not know a package."
        [ $status = 1 ] || status=2
    fi
done
exit $status
