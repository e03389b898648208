#!/bin/sh
# Makes the environment of the tools that look after dependencies and builds; prints nothing when nothing is to do.
#
#   .ci/tools.sh VENV PYTHON
#
# It is apart from the other environment, because the broker does not need these packages.
set -eu

venv=$1
lock=.ci/requirements-tools.txt
if [ "$venv/.installed" -nt "$lock" ]; then
    exit 0
fi
echo "installing into $venv ..." >&2
[ -e "$venv" ] || "$2" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --require-hashes --requirement "$lock" \
    </dev/null
touch "$venv/.installed"
