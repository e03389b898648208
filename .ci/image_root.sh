#!/bin/sh
# Puts what a virtual environment needs to run into a directory that becomes the root of an image: the environment, its
# Python without what only developers use, the system's libraries that these load, and nothing else. No shell, no
# package manager, no pip. For the Dockerfile, in a stage that has binutils.
#
#   .ci/image_root.sh VENV ROOT USER_ID
set -eu

venv=$1
root=$2
id=$3

python=$(readlink -f "$venv/bin/python")
stdlib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

mkdir -p "$root/usr/lib" "$root/usr/lib64" "$root/tmp" "$root/etc/brokerd" "$root/run/brokerd" "$root/run/secrets" \
    "$root/var/lib/brokerd" "$root/var/lib/dpkg/status.d"
ln -s usr/lib "$root/lib"
ln -s usr/lib64 "$root/lib64"
chmod 1777 "$root/tmp"
# A fresh volume takes the owner of the directory that it hides.
chown "$id:$id" "$root/etc/brokerd" "$root/run/brokerd" "$root/var/lib/brokerd"

# All at the same paths, so that the environment's links lead to its Python.
tar -C / --create "${venv#/}" "${python#/}" "${stdlib#/}" | tar -C "$root" --extract
for name in python python3; do
    [ -e "$root${python%/*}/$name" ] || ln -s "${python##*/}" "$root${python%/*}/$name"
done
cd "$root$stdlib"
rm -rf site-packages config-* ensurepip idlelib lib2to3 pydoc_data test tkinter turtledemo turtle.py venv \
    curses dbm lib-dynload/_curses* lib-dynload/_dbm* lib-dynload/_gdbm* \
    lib-dynload/_tkinter* lib-dynload/readline* lib-dynload/_test* lib-dynload/_ctypes_test* lib-dynload/xx*
rm -f "$root$venv"/bin/activate* "$root$venv"/bin/Activate*
find "$root" -name __pycache__ -prune -exec rm -rf {} +
find "$root" -path '*/site-packages/*' -type f '(' -name '*.[ch]' -o -name '*.pyx' -o -name '*.pxd' ')' -exec rm -f {} +
find "$root" -name tests -path '*/site-packages/*' -prune -exec rm -rf {} +

# What the programs and modules load, and what the system's C library loads by itself when a thread is cancelled.
find "$root" -type f \( -name '*.so*' -o -perm -100 \) -exec sh -c 'ldd "$1" 2>/dev/null || true' _ {} \; |
    awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\/.*ld-/ { print $1 }' | sort -u >/tmp/libraries
dirname "$(grep '/libc\.so\.6$' /tmp/libraries)" | sed 's|$|/libgcc_s.so.1|' >>/tmp/libraries
sort -u /tmp/libraries | while read -r library; do
    # Already there: a wheel brings some of its own.
    [ -e "$root$library" ] && continue
    mkdir -p "$root${library%/*}"
    cp -L "$library" "$root$library"
    # A scanner for known weaknesses finds each library's package, as in other images without dpkg.
    package=$(dpkg-query --search "*${library#/usr}" 2>/dev/null | head -n 1 | cut -d : -f 1)
    [ -z "$package" ] || dpkg-query --status "$package" >"$root/var/lib/dpkg/status.d/$package"
done
find "$root" -type f -name '*.so*' -exec strip --strip-unneeded {} +
cp /etc/os-release "$root/etc/"
echo /usr/local/lib >"$root/etc/ld.so.conf"
ldconfig -r "$root"
printf 'root:x:0:0:root:/:/nowhere\nbrokerd:x:%s:%s:brokerd:/:/nowhere\n' "$id" "$id" >"$root/etc/passwd"
printf 'root:x:0:\nbrokerd:x:%s:\n' "$id" >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"

# The root is read-only: bytecode is made now or at every start. It is never checked against sources that can't change.
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$root" "$root$stdlib" "$root$venv/lib"
