#!/bin/bash
# Makes target/deb/dst_VERSION_ARCHITECTURE.deb out of what was built, with dpkg-deb alone. DEB_MAINTAINER is who answers for it.
set -euo pipefail
cd "$(dirname "$0")/../.."
umask 022
dist=dst-cli/dist
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
architecture=$(dpkg --print-architecture)
out=target/deb
root=$out/root
rm -rf "$out"
mkdir -p "$root/DEBIAN"

DESTDIR=$PWD/$root PREFIX=/usr SYSCONFDIR=/etc "$dist/install.sh" install
# dpkg keeps that list itself.
rm -r "$root/usr/share/dst"
strip --strip-unneeded "$root/usr/bin/dst" "$root/usr/bin/dstd"
find "$root/usr/share/man" -type f -exec gzip -9n {} +
doc=$root/usr/share/doc/dst
mv "$doc/CHANGELOG.md" "$doc/changelog"
gzip -9n "$doc/changelog"
{
    echo 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/'
    echo 'Upstream-Name: dst'
    echo
    echo 'Files: *'
    echo 'Copyright: the dst maintainers'
    echo 'License: MIT or Apache-2.0'
    sed 's/^$/./; s/^/ /' LICENSE
} >"$doc/copyright"
rm "$doc/LICENSE"

# needs LIBRARY: whether one of the programs is linked with it.
needs() { objdump -p "$root"/usr/bin/* | grep "NEEDED *$1" >/dev/null; }
glibc=$(objdump -T "$root"/usr/bin/* | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -uV | tail -n 1)
depends="libc6 (>= $glibc)"
! needs libgcc_s || depends+=", libgcc-s1"
cat >"$root/DEBIAN/control" <<CONTROL
Package: dst
Version: $version
Architecture: $architecture
Maintainer: ${DEB_MAINTAINER:-the dst maintainers <dst@localhost>}
Installed-Size: $(du -sk --exclude=DEBIAN "$root" | cut -f1)
Depends: $depends
Recommends: kmod
Section: admin
Priority: optional
Description: disks of several machines as one Linux block device
 A daemon on each machine stores volumes, another makes block devices of
 them, linear or striped, with up to three copies of the data. Any part of
 a device can be replaced while it is in use.
CONTROL
echo /etc/dst/dstd.toml >"$root/DEBIAN/conffiles"
install -m 755 "$dist"/debian/* "$root/DEBIAN/"
(cd "$root" && find etc usr -type f -exec md5sum {} + | sort -k 2) >"$root/DEBIAN/md5sums"
dpkg-deb --root-owner-group -Zxz -z1 --build "$root" "$out" >/dev/null
echo "$out/dst_${version}_$architecture.deb"
