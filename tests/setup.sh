#!/bin/bash
# Makes a Debian machine ready to build, test and demonstrate dst. `make setup` runs it; it costs a fraction of a
# second when there is nothing to do, and two may run at once.
#
# Programs come from the machine's own apt sources. What the virtual machine needs lies under target/vm/ and nowhere
# else: two kernels with ublk, unpacked but not installed, and virtme-ng (venv/). kernel/ is the oldest on which dst
# serves block devices (its version in kernel.version), kernel-new/ the newest that Debian has, with what ublk has
# learned since (kernel-new.version). Each comes from a private apt tree (apt/, apt-new/): the machine's own source
# file with the suite changed.
set -euo pipefail

VIRTME_VERSION=1.42
root=$(cd "$(dirname "$0")/.." && pwd)
vm=$root/target/vm
PATH=$PATH:/usr/sbin:/sbin
export DEBIAN_FRONTEND=noninteractive

say() { echo "setup: $*"; }
die() { echo "setup: FAILED: $*" >&2; exit 1; }

# Network downloads fail now and then for reasons that are gone a moment later.
retry() {
    local n
    for n in 1 2 3 4; do
        "$@" && return 0
        [ "$n" = 4 ] || { say "that failed, trying again ($n of 3)"; sleep $((n * 3)); }
    done
    return 1
}

# "program package": the package is wanted only if the program is not there already.
wanted='
cc gcc
strip binutils
qemu-system-x86_64 qemu-system-x86
qemu-img qemu-utils
busybox busybox-static
file file
modprobe kmod
ip iproute2
fio fio
mkfs.ext4 e2fsprogs
mkfs.xfs xfsprogs
sfdisk fdisk
dmsetup dmsetup
strace strace
nbdkit nbdkit
nbdinfo libnbd-bin
nbdcopy libnbd-bin
nbd-client nbd-client
stress-ng stress-ng
'

# The C library, under any of the names that bindgen looks for; libclang-cpp is another one.
has_libclang() {
    local folder name
    [ -z "${LIBCLANG_PATH:-}" ] || return 0
    for folder in '/usr/lib/llvm-*/lib' /usr/lib/x86_64-linux-gnu; do
        for name in 'libclang.so*' 'libclang-[0-9]*.so*'; do
            ! compgen -G "$folder/$name" >/dev/null || return 0
        done
    done
    return 1
}

missing_packages() {
    local program package
    while read -r program package; do
        [ -z "$program" ] || command -v "$program" >/dev/null || echo "$package"
    done <<<"$wanted"
    [ -e /usr/include/stdlib.h ] || echo libc6-dev
    # bindgen, which builds the ublk bindings, loads this library.
    has_libclang || libclang_package
    /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
}

# The one that goes with this release's own clang.
libclang_package() {
    local default
    default=$(apt-cache depends clang 2>/dev/null | sed -n 's/^ *Depends: *clang-\([0-9]*\)$/\1/p' | head -n1)
    echo "libclang1${default:+-$default}"
}

install_packages() {
    local missing round
    missing=$(missing_packages | sort -u | xargs)
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || die "this machine has no apt-get; install what these Debian packages hold: $missing"
    [ "$(id -u)" = 0 ] || die "packages are missing and only root can install them; run: sudo make setup"
    say "apt-get update"
    retry apt-get -qq update || die "apt-get update does not work; look at the lines above"
    # The second round is for what the first one had to remove: qemu-utils of another suite does not go with this
    # suite's qemu-system-x86.
    for round in 1 2; do
        missing=$(missing_packages | sort -u | xargs)
        [ -n "$missing" ] || break
        say "installing $missing"
        # shellcheck disable=SC2086 # a list of words
        retry apt-get -qq -y -o Dpkg::Use-Pty=0 --no-install-recommends install $missing >"$vm/apt-install.$round.log" 2>&1 \
            || { tail -n 20 "$vm/apt-install.$round.log" >&2; die "apt-get could not install: $missing"; }
        sed -n 's/^Removing /setup: apt removed /p' "$vm/apt-install.$round.log"
    done
    missing=$(missing_packages | sort -u | xargs)
    [ -z "$missing" ] || die "installed, but their programs are still not there: $missing"
    fio --enghelp | grep -qw nbd || die "this fio has no nbd engine; remove it from PATH and install Debian's: apt-get install fio"
}

# The machine's apt source of this release, with another suite name, for the private tree TREE.
source_with_suite() {
    local codename=$1 suite=$2 tree=$3 file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        # deb822: keep the stanzas that hold the release itself, neither its updates nor its security suite.
        awk -v RS= -v codename="$codename" -v suite="$suite" '
            $0 ~ "(^|\n)Suites:([^\n]*[ \t])?" codename "([ \t\n]|$)" {
                gsub(/(^|\n)Suites:[^\n]*/, "\nSuites: " suite); gsub(/(^|\n)Types:[^\n]*/, "\nTypes: deb")
                gsub(/(^|\n)Components:[^\n]*/, "\nComponents: main"); sub(/^\n/, ""); print $0 "\n"; exit
            }' "$file"
    done >"$tree/machine.sources"
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | awk -v codename="$codename" -v suite="$suite" '
        $1 == "deb" { for (i = 2; i < NF; i++) if ($i == codename) { $i = suite; NF = i + 1; $NF = "main"; print; exit } }' \
        >"$tree/machine.list" || true
    [ -s "$tree/machine.sources" ] || rm "$tree/machine.sources"
    [ -s "$tree/machine.list" ] || rm "$tree/machine.list"
    compgen -G "$tree/machine.*" >/dev/null || die "no apt source of $codename in /etc/apt/sources.list or sources.list.d"
}

# private_apt TREE COMMAND...: apt in a private tree. Its configuration (proxies, certificates) is the machine's; its
# state is not, and nothing is ever installed from there.
private_apt() {
    local tree=$1 command=$2
    shift 2
    "$command" -q -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$tree" -o Dir::Etc::preferences=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o Dir::State="$tree/state" -o Dir::State::status="$tree/status" \
        -o Dir::Cache="$tree/cache" -o APT::Sandbox::User=root "$@"
}

download_kernel() {
    local tree=$1
    shift
    rm -f "$tree"/debs/*
    (cd "$tree/debs" && private_apt "$tree" apt-get download "$@" >>"$tree/log" 2>&1)
}

# The packages that hold a kernel, its modules and the lists of what is built in: one, or, where that is an empty shell, three.
kernel_packages() {
    local tree=$1 version=$2
    if private_apt "$tree" apt-cache show "linux-binary-$version" >/dev/null 2>&1; then
        echo "linux-base-$version linux-binary-$version linux-modules-$version"
    else
        echo "linux-image-$version"
    fi
}

# install_kernel NAME CODENAME SUITE: the newest kernel of a suite, unpacked in target/vm/NAME.
install_kernel() {
    local name=$1 codename=$2 suite=$3 kernel=$vm/$1 tree=$vm/${1/kernel/apt} version packages deb
    [ ! -e "$kernel.version" ] || return 0
    say "the guest's $name: reading the list of $suite"
    mkdir -p "$tree/state/lists/partial" "$tree/cache/archives/partial" "$tree/debs"
    : >"$tree/status"
    : >"$tree/log"
    source_with_suite "$codename" "$suite" "$tree"
    # What cannot be reached is only a warning to apt, which then goes on with nothing.
    retry private_apt "$tree" apt-get -o APT::Update::Error-Mode=any update >>"$tree/log" 2>&1 \
        || { tail -n 20 "$tree/log" >&2; die "cannot read the package list of $suite, where the guest's $name comes from: is that suite in reach of the sources in /etc/apt?"; }
    version=$(private_apt "$tree" apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: *linux-image-\([0-9].*-amd64\)$/\1/p' | tail -n1)
    [ -n "$version" ] || die "$suite has no linux-image-amd64"
    packages=$(kernel_packages "$tree" "$version")
    say "the guest's $name: downloading $packages"
    # shellcheck disable=SC2086 # a list of words
    retry download_kernel "$tree" $packages || { tail -n 20 "$tree/log" >&2; die "cannot download $packages"; }
    rm -rf "$kernel"
    for deb in "$tree"/debs/*.deb; do dpkg-deb -x "$deb" "$kernel"; done
    # depmod and virtme-ng look for lib/modules.
    [ -d "$kernel/lib/modules" ] || ln -s usr/lib "$kernel/lib"
    # Newer packages have the image beside the modules.
    mkdir -p "$kernel/boot"
    [ ! -e "$kernel/lib/modules/$version/vmlinuz" ] || ln -f "$kernel/lib/modules/$version/vmlinuz" "$kernel/boot/vmlinuz-$version"
    depmod -b "$kernel" "$version"
    [ -e "$kernel/boot/vmlinuz-$version" ] || die "$packages: no boot/vmlinuz-$version in it"
    rm -rf "$tree/debs" "$tree/cache"
    echo "$version" >"$kernel.version.new"
    mv "$kernel.version.new" "$kernel.version"
}

install_kernels() {
    local codename suite
    # shellcheck disable=SC1091 # written by the distribution
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    case $codename in
    bookworm) suite=bookworm-backports ;; # its own kernel is 6.1: ublk is there, but not all that is needed of it
    '') die "no VERSION_CODENAME in /etc/os-release: is this Debian 12 or newer?" ;;
    *) suite=$codename ;;
    esac
    install_kernel kernel "$codename" "$suite"
    # Where Debian is developed: there is no newer one.
    install_kernel kernel-new "$codename" unstable
}

install_virtme() {
    local stamp=$vm/venv/virtme-ng-$VIRTME_VERSION
    # The path of a venv is written into its programs: one that was moved or copied does not work.
    [ "$(cat "$stamp" 2>/dev/null)" != "$vm" ] || return 0
    say "installing virtme-ng $VIRTME_VERSION into target/vm/venv"
    rm -rf "$vm/venv"
    /usr/bin/python3 -m venv "$vm/venv"
    retry "$vm/venv/bin/pip" install -q --disable-pip-version-check "virtme-ng==$VIRTME_VERSION" >"$vm/pip.log" 2>&1 \
        || { tail -n 20 "$vm/pip.log" >&2; die "pip cannot install virtme-ng $VIRTME_VERSION"; }
    PATH=$vm/venv/bin:$PATH "$vm/venv/bin/vng" --version >/dev/null || die "virtme-ng was installed but does not start"
    echo "$vm" >"$stamp"
}

mkdir -p "$vm"
exec 9>"$vm/.setup.lock"
flock -n 9 || { say "waiting for another setup"; flock 9; }
install_packages
install_kernels
install_virtme
say "ok (kernels $(cat "$vm/kernel.version") and $(cat "$vm/kernel-new.version"), virtme-ng $VIRTME_VERSION)"
