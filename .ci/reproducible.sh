#!/bin/sh
# Builds the wheel, with the compiled loop inside, and the sdist, those of brokerd-client too: twice, in two places, and
# compares them byte for byte. What comes out lies in dist. The time in it is that of the last commit.
#
#   .ci/reproducible.sh TOOLS_VENV
#
# The wheel of brokerd is for the Python of that environment. The same commit, Python, compiler and locks give the same
# bytes.
set -eu

tools=$PWD/$1/bin/python
root=$PWD
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
umask 022

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() {
    place=$work/$1
    mkdir -p "$place"
    git archive HEAD | tar -x -C "$place"
    # A fresh environment with exactly what the lock says.
    "$tools" -m venv "$place/venv"
    "$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
        --requirement "$root/.ci/requirements-build.txt" --requirement "$root/.ci/requirements-tools.txt" </dev/null
    cd "$place"
    # In place of these flags, not besides them, are those of the environment taken.
    usual=$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("CFLAGS"))')
    # Where it was compiled stands nowhere: not in what a debugger reads, nor in a checksum of that.
    for source in . client; do
        CFLAGS="$usual -DNDEBUG -g0 -ffile-prefix-map=$place=." LDFLAGS="-Wl,--build-id=none -Wl,-s" \
            "$place/venv/bin/python" -m build --no-isolation --outdir "$place/dist" "$source" >"$place/log" 2>&1 ||
            { cat "$place/log"; exit 1; }
    done
    cd "$root"
    # setuptools takes the times of the files, of which it has just made some, and the current user.
    for sdist in "$place"/dist/*.tar.gz; do
        "$tools" .ci/repack_sdist.py "$sdist"
    done
    unzip -l "$place"/dist/brokerd-*.whl | grep -q '_routing_c\..*\.so' || { echo "the wheel lacks the compiled loop"; exit 1; }
}

build one
build another/and/longer
mkdir -p dist
status=0
for file in "$work"/one/dist/*; do
    name=$(basename "$file")
    if cmp "$file" "$work/another/and/longer/dist/$name"; then
        cp "$file" dist/
        echo "the same twice: $(cd dist && sha256sum "$name")"
    else
        status=1
    fi
done
exit $status
