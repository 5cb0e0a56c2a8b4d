#!/usr/bin/env bash
# Installs what `make train`, `make web` or `make test` needs and the machine lacks. Debian and Ubuntu; elsewhere it says what to
# install. Argument: train, web or test.
set -euo pipefail

missing=()
want() { # command, package
    command -v "$1" >/dev/null 2>&1 || missing+=("$2")
}

want cc build-essential
if ! command -v cargo >/dev/null 2>&1; then missing+=(curl ca-certificates); fi

# A driver is a manifest that the Vulkan loader reads.
has_driver() {
    ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' &&
        compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null ||
        compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null
}
has_driver || missing+=(mesa-vulkan-drivers)

if [ "$1" != train ]; then
    # The page is built with the npm registry's tools, which ask for Node.js 18 or later.
    want node nodejs
    want npm npm
fi

if [ "$1" = test ]; then
    # Tests always need the software adapter, and Chromium: a browser, and SwiftShader as a second vendor.
    compgen -G '/usr/share/vulkan/icd.d/lvp_icd*.json' >/dev/null || missing+=(mesa-vulkan-drivers)
    command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || missing+=(chromium)
fi

# apt-get, which gives up at once when another program holds one of its locks; a fresh machine updates itself for minutes.
# Its own option to wait covers neither the lists nor the archives.
apt() {
    local root=() log
    [ "$(id -u)" = 0 ] || root=(sudo)
    log=$(mktemp)
    for try in {1..180}; do
        if "${root[@]}" env LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get "$@" 2>"$log"; then
            cat "$log" >&2
            rm "$log"
            return
        fi
        grep -q '^E: Could not get lock' "$log" || break
        [ "$try" -gt 1 ] || echo "another program holds apt's lock; waiting for up to half an hour" >&2
        sleep 10
    done
    cat "$log" >&2
    rm "$log"
    return 1
}

if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "please install: ${missing[*]}" >&2
        exit 1
    fi
    apt update
    apt install -y "${missing[@]}"
fi

if ! command -v cargo >/dev/null 2>&1; then
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --component clippy,rustfmt
fi

if [ "$1" = web ]; then
    rustup target add wasm32-unknown-unknown
fi
if [ "$1" != train ] && ! node --version | grep -qE '^v(1[89]|[2-9][0-9])'; then
    echo "please install Node.js 18 or later (here it is $(node --version)); nodejs.org has packages for every system" >&2
    exit 1
fi

if [ "$1" = test ]; then
    rustup target add wasm32-unknown-unknown x86_64-pc-windows-gnu aarch64-apple-darwin
    rustup component add clippy rustfmt
fi
