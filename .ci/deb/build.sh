#!/bin/sh
# Builds the Debian package dist/brokerd_VERSION_ARCHITECTURE.deb. Needs dpkg-deb, a C compiler, and for each Python of
# a Debian release an interpreter with its headers; says which of them it leaves out.
#
#   .ci/deb/build.sh PYTHON VERSION...
#
# PYTHON:  an interpreter with pip, which installs for all others.
# VERSION: Python versions, such as 3.11. The package runs on the system's Python if that is one of them, and brings its
#          libraries for each. Nothing is fetched when the package is installed.
#
# DIST names the directory of the package; it is dist if nothing else is said.
#
# As in setup.sh, the libraries are those of the locks; UNLOCKED=1 takes what pyproject.toml allows.
set -eu

pip_python=$1
shift
root=$PWD
umask 022
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
architecture=$(dpkg --print-architecture)

say() { printf '%s\n' "$*" >&2; }

pip() {
    python=$1
    shift
    "$pip_python" -m pip --python "$python" --disable-pip-version-check --no-input "$@" --quiet </dev/null
}

# Prints an interpreter of a version that can compile modules: the system's, or one of pyenv's.
find_python() {
    for candidate in "/usr/bin/python$1" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$candidate" -c 'import os, sys, sysconfig
sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1] or
         not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' "$1" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# A copy: what earlier builds have left in the checkout must not get into the package.
mkdir "$work/source"
tar --create --exclude='*.so' --exclude='*.c' --exclude=__pycache__ --exclude=build --exclude='*.egg-info' \
    pyproject.toml setup.py README.md LICENSE brokerd client | tar --extract --directory "$work/source"

built=
for wanted; do
    if ! python=$(find_python "$wanted"); then
        say "without Python $wanted: there is no python$wanted with its headers here (python$wanted-dev)"
        continue
    fi
    say "building for Python $wanted ..."
    libraries=$tree/usr/lib/brokerd/python$wanted
    mkdir -p "$libraries"
    "$python" -m venv --without-pip "$work/venv$wanted"
    builder=$work/venv$wanted/bin/python
    if [ -n "${UNLOCKED:-}" ]; then
        pip "$builder" install "setuptools>=80" "Cython>=3.1"
        with=
    else
        with=--no-deps
        pip "$builder" install --require-hashes --requirement .ci/requirements-build.txt
        pip "$builder" install --require-hashes --only-binary :all: --no-compile --target "$libraries" \
            --requirement .ci/requirements-run.txt
    fi
    usual=$("$builder" -c 'import sysconfig; print(sysconfig.get_config_var("CFLAGS"))')
    # Those of an interpreter would lead the modules to its own libraries.
    LDSHARED="${CC:-cc} -shared -Wl,-z,relro,-z,now" CFLAGS="$usual -O2 -g0 -DNDEBUG -ffile-prefix-map=$work=." \
        "$pip_python" -m pip --python "$builder" wheel --quiet --disable-pip-version-check --no-input --no-deps \
        --no-build-isolation --wheel-dir "$work/wheel$wanted" "$work/source" </dev/null
    pip "$builder" install --no-compile --upgrade $with --target "$libraries" "$work/wheel$wanted"/*.whl
    # The loop is optional to an installation, and not to a package.
    reason=$("$builder" -sP -c 'import sys; sys.path.insert(0, sys.argv[1]); from brokerd.core import WHY_SOURCES as why
print(why)' "$libraries")
    [ -z "$reason" ] || { say "nothing was compiled for Python $wanted: $reason"; exit 1; }
    rm -rf "$libraries/bin" "$libraries"/*/tests "$libraries"/*.dist-info/direct_url.json "$work/source/build"
    find "$libraries" -name __pycache__ -prune -exec rm -rf {} +
    find "$libraries" -type f '(' -name '*.[ch]' -o -name '*.pyx' -o -name '*.pxd' ')' -exec rm -f {} +
    find "$libraries" -type f -exec chmod 644 {} +
    # A module is no command.
    find "$libraries" -name '*.py' -exec sed -i '1{/^#!/d}' {} +
    find "$libraries" -name '*.so' -exec strip --strip-unneeded --remove-section=.comment --remove-section=.note {} +
    built="$built $wanted"
done
[ -n "$built" ] || { say "no Python to build for was found"; exit 1; }

# python3 of one of these versions, and of none between them.
depends=
previous=
for each in $built; do
    next=${each%.*}.$((${each#*.} + 1))
    if [ -z "$depends" ]; then
        depends="python3 (>= $each)"
    elif [ "$previous" != "$each" ]; then
        depends="$depends, python3 (<< $previous) | python3 (>= $each)"
    fi
    previous=$next
done
depends="$depends, python3 (<< $previous)"

place() {
    mkdir -p "$tree$(dirname "$3")"
    install -m "$1" "$2" "$tree$3"
}

for command in brokerd brokerctl; do
    mkdir -p "$tree/usr/bin"
    cat >"$tree/usr/bin/$command" <<END
#!/usr/bin/python3 -sP
import sys

sys.path.insert(0, "/usr/lib/brokerd/python%d.%d" % sys.version_info[:2])

from brokerd.entry import $command

sys.exit($command())
END
    chmod 755 "$tree/usr/bin/$command"
done
# The package's own command, whatever /usr/local/bin has.
sed 's|^\(Exec[A-Za-z]*=\)brokerd|\1/usr/bin/brokerd|' systemd/brokerd.service >"$work/brokerd.service"
place 644 "$work/brokerd.service" /usr/lib/systemd/system/brokerd.service
place 644 systemd/brokerd.socket /usr/lib/systemd/system/brokerd.socket
place 644 systemd/brokerd.sysusers.conf /usr/lib/sysusers.d/brokerd.conf
place 644 systemd/brokerd.tmpfiles.conf /usr/lib/tmpfiles.d/brokerd.conf
place 644 .ci/deb/brokerd.yaml /etc/brokerd/brokerd.yaml
for each in notify-reload credentials peer-uid unix-only; do
    place 644 "systemd/brokerd-$each.conf" "/usr/share/doc/brokerd/systemd/brokerd-$each.conf"
done
for each in docs/*.md; do
    place 644 "$each" "/usr/share/doc/brokerd/$each"
done
place 644 .ci/deb/lintian-overrides /usr/share/lintian/overrides/brokerd
place 644 config/brokerd.yaml /usr/share/doc/brokerd/examples/brokerd.yaml
place 644 config/brokerd.schema.json /usr/share/doc/brokerd/examples/brokerd.schema.json
"$builder" -sP .ci/deb/command_pages.py "$libraries" "$tree/usr/share"

maintainer=$(sed -n 's/^Maintainer: //p' .ci/deb/control)
documents=$tree/usr/share/doc/brokerd
{
    printf 'brokerd (%s) stable; urgency=medium\n\n' "$version"
    printf '  * Version %s. The pages beside this file tell what it does.\n\n' "$version"
    printf ' -- %s  %s\n' "$maintainer" "$(LC_ALL=C date --utc --rfc-email --date "@$SOURCE_DATE_EPOCH")"
} | gzip -9n >"$documents/changelog.gz"
{
    cat .ci/deb/copyright
    sed 's/^$/./; s/^/ /' LICENSE
} >"$documents/copyright"

mkdir "$tree/DEBIAN"
sed "s/@VERSION@/$version/; s/@ARCHITECTURE@/$architecture/; s/@PYTHON@/$depends/
s/@SIZE@/$(du --summarize --apparent-size --block-size=1024 "$tree/usr" | cut -f 1)/" .ci/deb/control >"$tree/DEBIAN/control"
echo /etc/brokerd/brokerd.yaml >"$tree/DEBIAN/conffiles"
for script in postinst prerm postrm; do
    install -m 755 ".ci/deb/$script" "$tree/DEBIAN/$script"
done
(cd "$tree" && find etc usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)
find "$tree" -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +

cd "$root"
dist=${DIST:-dist}
mkdir -p "$dist"
package=$dist/brokerd_${version}_$architecture.deb
dpkg-deb --root-owner-group -Zxz --build "$tree" "$package" >/dev/null
say "for Python$built:"
printf '%s\n' "$package"
