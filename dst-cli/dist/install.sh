#!/bin/bash
# Puts what was built where a system expects it, or takes it away again.
#
#   install.sh install|uninstall        with PREFIX (/usr/local), SYSCONFDIR (/etc) and DESTDIR (nothing) in the environment
#
# What it has made, files and directories, is kept in PREFIX/share/dst/installed: uninstall removes that and nothing else. A
# configuration that is there is never replaced, and one that was changed is not removed.
set -euo pipefail
cd "$(dirname "$0")/../.."
PREFIX=${PREFIX:-/usr/local} SYSCONFDIR=${SYSCONFDIR:-/etc} DESTDIR=${DESTDIR:-}
built=target/release dist=dst-cli/dist
list=$PREFIX/share/dst/installed
config=$SYSCONFDIR/dst/dstd.toml
umask 022

die() { echo "install.sh: $*" >&2; exit 1; }

# The directories of a path that are not there yet, the outermost first.
missing_directories() {
    [ -d "$DESTDIR$1" ] || [ "$1" = / ] || { missing_directories "$(dirname "$1")"; echo "$1/"; }
}

# put MODE SOURCE PLACE: one file, and its directories; what is made is noted.
put() {
    missing_directories "$(dirname "$3")" >>"$work/made"
    mkdir -p "$DESTDIR$(dirname "$3")"
    # Beside the old one and over it, which may be running.
    install -m "$1" "$2" "$DESTDIR$3.new"
    mv "$DESTDIR$3.new" "$DESTDIR$3"
    echo "$3" >>"$work/made"
}

do_install() {
    local program file zsh=site-functions
    for program in dst dstd; do
        [ -x "$built/$program" ] || die "$built/$program is not there; run: make build"
        "$built/$program" generate "$work/$program"
    done
    : >"$work/made"
    for program in dst dstd; do
        put 755 "$built/$program" "$PREFIX/bin/$program"
        for file in "$work/$program"/*.[18]; do
            put 644 "$file" "$PREFIX/share/man/man${file##*.}/${file##*/}"
        done
        put 644 "$work/$program/$program.bash" "$PREFIX/share/bash-completion/completions/$program"
        put 644 "$work/$program/$program.fish" "$PREFIX/share/fish/vendor_completions.d/$program.fish"
        # Where Debian's zsh looks depends on whose the file is.
        [ "$PREFIX" != /usr ] || zsh=vendor-completions
        put 644 "$work/$program/_$program" "$PREFIX/share/zsh/$zsh/_$program"
    done
    for file in "$dist"/*.service; do
        sed "s|/usr/bin/|$PREFIX/bin/|" "$file" >"$work/unit"
        put 644 "$work/unit" "$PREFIX/lib/systemd/system/${file##*/}"
    done
    for file in README.md LICENSE docs/*.md; do
        put 644 "$file" "$PREFIX/share/doc/dst/${file##*/}"
    done
    if [ ! -e "$DESTDIR$config" ]; then
        put 644 "$dist/dstd.toml" "$config"
    else
        # As it came, so that uninstall can tell whether it was changed; whose it is stays as it was.
        ! grep -qxF "$config" "$DESTDIR$list" 2>/dev/null || echo "$config" >>"$work/made"
    fi
    put 644 "$dist/dstd.toml" "$PREFIX/share/dst/dstd.toml"
    # What an earlier version had, too.
    if [ -e "$DESTDIR$list" ]; then
        grep '/$' "$DESTDIR$list" >"$work/before" || true
        cat "$work/made" >>"$work/before"
        mv "$work/before" "$work/made"
        grep -v '/$' "$DESTDIR$list" | grep -vxFf "$work/made" | while read -r file; do rm -f "$DESTDIR$file"; done || true
    fi
    echo "$list" >>"$work/made"
    put 644 "$work/made" "$list"
    [ -n "$DESTDIR" ] || echo "installed below $PREFIX; now: systemctl daemon-reload"
}

do_uninstall() {
    [ -e "$DESTDIR$list" ] || die "$DESTDIR$list is not there: nothing was installed below $PREFIX"
    cp "$DESTDIR$list" "$work/made"
    local file
    if grep -qxF "$config" "$work/made" && [ -e "$DESTDIR$config" ] && ! cmp -s "$DESTDIR$config" "$DESTDIR$PREFIX/share/dst/dstd.toml"; then
        echo "$config was changed and stays"
        sed -i "\|^$config\$|d" "$work/made"
    fi
    grep -v '/$' "$work/made" | while read -r file; do rm -f "$DESTDIR$file"; done
    # The innermost first. Others may have put something there.
    grep '/$' "$work/made" | sort -ru | while read -r file; do rmdir --ignore-fail-on-non-empty "$DESTDIR$file" 2>/dev/null || true; done
}

case ${1:-} in
install | uninstall)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "do_$1"
    ;;
*) sed -n 's/^#   //p' "$0" >&2; exit 2 ;;
esac
