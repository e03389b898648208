#!/bin/sh
# Asks a vulnerability service about every locked package, also about those that are for other systems only.
#
#   .ci/audit.sh TOOLS_VENV
#
# The service is that of the package index. pip-audit's own variables name another: PIP_AUDIT_VULNERABILITY_SERVICE=osv, and
# PIP_AUDIT_OSV_URL for a service with the interface of osv.dev.
#
# The exit status is 1 if a vulnerability is known. If the service can't be reached, or does not know a package, nothing is
# known of it: then it says so, and the status is 2.
set -u

report=$(mktemp)
asked=$(mktemp)
trap 'rm -f "$report" "$asked"' EXIT
status=0
for name in run build test client tools; do
    lock=.ci/requirements-$name.txt
    # pip-audit silently skips packages that would not be installed here.
    sed -E 's/ ; [^\\]*\\$/ \\/' "$lock" >"$asked"
    # --strict: a package that could not be looked up is not a clean one.
    if "$1/bin/pip-audit" --strict --progress-spinner off --require-hashes --disable-pip --requirement "$asked" >"$report" 2>&1; then
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
