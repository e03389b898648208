#!/bin/sh
# Renews the locks beside it: exact versions of all that is installed for development, with the hash of every file, for
# each supported Python. For `make lock`.
#
#   .ci/lock.sh VENV        VENV: has uv; what .ci/tools.sh makes
#
# requirements-run.txt:    what brokerd itself needs.
# requirements-build.txt:  what builds it.
# requirements-test.txt:   both, and what the checks need.
# requirements-client.txt: what the tests of the library need, also on Pythons that brokerd is too new for.
# requirements-tools.txt:  what `make lock`, `audit`, `sbom` and `reproducible` run.
set -eu

uv=$PWD/$1/bin/uv
cd "$(dirname "$0")/.."

oldest=3.11
compile() {
    output=.ci/requirements-$1.txt
    shift
    "$uv" pip compile --quiet --upgrade --universal --python-version "$oldest" --generate-hashes --no-annotate --no-header \
        --no-emit-index-url --no-emit-find-links --output-file "$output.new" "$@" </dev/null
    { echo '# Written by `make lock`.'; cat "$output.new"; } >"$output"
    rm "$output.new"
    echo "$output: $(grep -c '==' "$output") packages"
}

build=$(mktemp)
tools=$(mktemp)
client=$(mktemp)
trap 'rm -f "$build" "$tools" "$client"' EXIT
"$1/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["build-system"]["requires"]))
' >"$build"
printf '%s\n' build cyclonedx-bom pip-audit uv >"$tools"
printf '%s\n' hypothesis opentelemetry-sdk pytest pytest-timeout trustme >"$client"

compile test --extra test pyproject.toml "$build"
compile run --constraint .ci/requirements-test.txt pyproject.toml
compile build --constraint .ci/requirements-test.txt "$build"
compile tools "$tools"
oldest=3.9
compile client "$client"
