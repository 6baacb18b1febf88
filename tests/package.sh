#!/bin/bash
# What `make install` and `make deb` make: installed below a directory of its own, used, and taken away again. Each check is counted.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/vm/lib.sh
. tests/vm/lib.sh
export LC_ALL=C
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
PATH=$PATH:/usr/sbin:/sbin
export DESTDIR=$T/dest PREFIX=/usr/local
mkdir "$DESTDIR"

says_version() {
    local program
    for program in dst dstd; do
        "$1/$program" --version | grep -Eq "^$program [0-9]+\.[0-9]+\.[0-9]+$"
    done
}
# The programs that units start are there, and so is what they document and read. UNITS PREFIX
units_are_whole() {
    local unit what
    for unit in dstd-array.service dstd-server@.service; do
        what=$(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$1/$unit")
        [ "$what" = "$2/bin/dstd" ]
        grep -q '^Type=notify$' "$1/$unit"
        grep -q '^WatchdogSec=' "$1/$unit"
        for what in $(sed -n 's/^Documentation=//p' "$1/$unit"); do
            [[ $what =~ ^man:(dstd?)\(([18])\)$ ]]
            ls "$DESTDIR$2/share/man/man${BASH_REMATCH[2]}/${BASH_REMATCH[1]}.${BASH_REMATCH[2]}"*
        done
    done
}
# What each verb does has a page, and a shell knows the verbs.
manual_is_whole() {
    local verb
    for verb in $(target/release/dst --help | sed -n '/^Commands:/,/^Options:/s/^  \([a-z-]*\) .*/\1/p'); do
        [ "$verb" = help ] || [ -s "$DESTDIR$PREFIX/share/man/man1/dst-$verb.1" ] || { echo "no page dst-$verb"; return 1; }
        grep -qw -- "$verb" "$DESTDIR$PREFIX/share/bash-completion/completions/dst" || { echo "no completion of $verb"; return 1; }
    done
    [ -s "$DESTDIR$PREFIX/share/man/man1/dst-volume-create.1" ]
    [ -s "$DESTDIR$PREFIX/share/man/man8/dstd-array.8" ]
    ! ls "$DESTDIR$PREFIX"/share/man/man1/*generate* 2>/dev/null
    bash -n "$DESTDIR$PREFIX/share/bash-completion/completions/dst"
    grep -q '^\.TH dstd 8' "$DESTDIR$PREFIX/share/man/man8/dstd.8"
}
nothing_is_left() { equal "what is left" "" "$(find "$DESTDIR" -mindepth 1)"; }
others_stay() {
    mkdir -p "$DESTDIR$PREFIX/share/man/man1"
    touch "$DESTDIR$PREFIX/share/man/man1/other.1"
    dst-cli/dist/install.sh install
    echo '# mine' >>"$DESTDIR/etc/dst/dstd.toml"
    # An older version had this one.
    touch "$DESTDIR$PREFIX/bin/dst-old"
    echo "$PREFIX/bin/dst-old" >>"$DESTDIR$PREFIX/share/dst/installed"
    dst-cli/dist/install.sh install
    [ ! -e "$DESTDIR$PREFIX/bin/dst-old" ]
    grep -q mine "$DESTDIR/etc/dst/dstd.toml"
    dst-cli/dist/install.sh uninstall
    equal "what stays" "etc/dst/dstd.toml usr/local/share/man/man1/other.1" "$(cd "$DESTDIR" && find . -type f | sort | sed 's|^\./||' | xargs)"
    rm -r "${DESTDIR:?}/etc" "${DESTDIR:?}/usr"
}

step "make install, make uninstall"
check "install" dst-cli/dist/install.sh install
check "what is installed runs" says_version "$DESTDIR$PREFIX/bin"
check "the units are whole" units_are_whole "$DESTDIR$PREFIX/lib/systemd/system" "$PREFIX"
check "each verb has a page and a completion" manual_is_whole
check "uninstall" dst-cli/dist/install.sh uninstall
check "nothing is left" nothing_is_left
check "what is others' stays, what was changed, too, and what is old goes" others_stay
check "nothing is left" nothing_is_left
check "what was never installed is not taken away" refused 'nothing was installed' dst-cli/dist/install.sh uninstall

# A root of its own. The scripts of the package are run outside of it, and told so; what it depends on is what this machine has.
R=$T/root
scratch_dpkg() { dpkg --root="$R" --force-script-chrootless --log=/dev/null "$@"; }
make_root() {
    local package
    mkdir -p "$R/var/lib/dpkg/info" "$R/var/lib/dpkg/updates"
    for package in libc6 libgcc-s1 gcc-12-base libcrypt1; do
        dpkg-query -s "$package" 2>/dev/null && echo
    done >"$R/var/lib/dpkg/status" || true
    grep -q '^Package: libc6$' "$R/var/lib/dpkg/status"
}
package_is_sound() {
    local bad
    dpkg-deb --info "$deb" >"$T/info"
    grep -q '^ Depends: libc6 (>= 2\.[0-9]*)' "$T/info"
    equal "the configuration files" /etc/dst/dstd.toml "$(dpkg-deb --ctrl-tarfile "$deb" | tar -xO ./conffiles)"
    dpkg-deb --contents "$deb" >"$T/contents"
    bad=$(awk '$2 != "root/root" || $1 !~ /^(-rw-r--r--|-rwxr-xr-x|drwxr-xr-x)$/' "$T/contents")
    equal "files that are not root's, or are open to others" "" "$bad"
    grep -q '\./usr/share/doc/dst/copyright$' "$T/contents"
}
is_installed() {
    scratch_dpkg --status dst | grep -x 'Status: install ok installed'
    [ -s "$R/usr/share/man/man1/dst-migrate.1.gz" ]
    [ -s "$R/usr/share/zsh/vendor-completions/_dst" ]
    DESTDIR=$R units_are_whole "$R/usr/lib/systemd/system" /usr
    (cd "$R" && md5sum --quiet -c var/lib/dpkg/info/dst.md5sums)
}
# The daemon takes the configuration that comes with it.
config_is_taken() { refused 'state-dir|/proc/nothing' "$R/usr/bin/dstd" --config "$R/etc/dst/dstd.toml" array --state-dir /proc/nothing; }
is_removed() {
    scratch_dpkg --remove dst
    [ ! -e "$R/usr" ]
    [ -e "$R/etc/dst/dstd.toml" ]
    scratch_dpkg --purge dst
    equal "what is left" "" "$(find "$R" -path "$R/var" -prune -o -mindepth 1 -print)"
}

step "make deb"
unset DESTDIR PREFIX
check "the package is made" dst-cli/dist/deb.sh
deb=$(ls target/deb/dst_*.deb)
check "it is sound" package_is_sound
check "a root of its own" make_root
check "it is installed" scratch_dpkg -i "$deb"
check "what is installed is whole" is_installed
check "it runs" says_version "$R/usr/bin"
check "its configuration is taken" config_is_taken
check "it is removed, and nothing is left" is_removed
finish_checks
