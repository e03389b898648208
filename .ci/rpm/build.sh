#!/bin/sh
# Builds dist/brokerd-VERSION-1.ARCHITECTURE.rpm from the files of the Debian package. Needs what that needs, and rpmbuild
# (on Debian: apt install rpm).
#
#   .ci/rpm/build.sh PYTHON VERSION...         as .ci/deb/build.sh, which it runs
#   .ci/rpm/build.sh FILE.deb                  from this Debian package
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree

deb=$1
if [ $# -gt 1 ]; then
    deb=$(DIST=$work .ci/deb/build.sh "$@")
fi
dpkg-deb --extract "$deb" "$tree"
rm -rf "$tree/usr/share/lintian" "$tree/usr/share/doc/brokerd/changelog.gz"
mv "$tree/usr/share/zsh/vendor-completions" "$tree/usr/share/zsh/site-functions"

# One of these Pythons has to be the system's.
pythons=
for libraries in "$tree"/usr/lib/brokerd/python*; do
    pythons="${pythons:+$pythons or }python(abi) = ${libraries##*/python}"
done
case $pythons in *" or "*) pythons="($pythons)" ;; esac

# The spec names the one file of /etc; tmpfiles.d makes the directories there.
(cd "$tree" && find usr ! -type d -printf '"/%p"\n') >"$work/files"
rpmbuild -bb --quiet --define "_topdir $work/rpm" --define "_rpmdir $work/out" --define "tree $tree" \
    --define "brokerd_version $(dpkg-deb --field "$deb" Version)" --define "pythons $pythons" \
    --define "file_list $work/files" .ci/rpm/brokerd.spec >&2
mkdir -p dist
for package in "$work"/out/*/*.rpm; do
    cp "$package" dist/
    printf '%s\n' "dist/${package##*/}"
done
