#!/usr/bin/env bash
# The shader compilers of AMD, NVIDIA (NVK), Intel and Apple as they are in Mesa, without their cards: unpacks Debian unstable's Mesa,
# with the C library it needs, into a folder, and builds the two programs beside this script against it. Nothing of the system is
# changed. Argument: the folder (default ~/.cache/polystage/isa); it is filled once.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/polystage/isa}
mkdir -p "$root"
stamp=$(cat "$here"/* | sha256sum | cut -c1-16)
if [ "$(cat "$root/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$root"
    mkdir -p "$root"/apt/{lists/partial,cache/archives/partial} "$root/sid" "$root/icd"
    : >"$root/apt/status"
    # The mirror that this machine uses already.
    mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        sed -nE 's/^(URIs:|deb( \[[^]]*\])?) +([^ ]+).*/\3/p' | grep -E '/debian/?$' | head -1 || true)
    [ -n "$mirror" ] || { echo "no Debian mirror is configured here" >&2; exit 1; }
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$keys] $mirror unstable main" >"$root/apt/unstable.list"
    options=(-o Dir::Etc::sourcelist="$root/apt/unstable.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::status="$root/apt/status" -o Dir::State::lists="$root/apt/lists" -o Dir::Cache="$root/apt/cache"
        -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Acquire::Languages=none -o Debug::NoLocking=true)
    apt-get "${options[@]}" update -qq >&2
    apt-get "${options[@]}" install -y -qq --download-only \
        mesa-vulkan-drivers mesa-drm-shim libvulkan1 libvulkan-dev libdrm-dev >&2
    for package in "$root"/apt/cache/archives/*.deb; do dpkg -x "$package" "$root/sid"; done
    rm -rf "$root/apt"
    [ -e "$root/sid/lib" ] || ln -s usr/lib "$root/sid/lib"
    libraries=$root/sid/usr/lib/x86_64-linux-gnu
    for driver in radeon nouveau intel asahi lvp; do
        printf '{"file_format_version":"1.0.1","ICD":{"api_version":"1.3.0","library_path":"%s"}}\n' \
            "$libraries/libvulkan_$driver.so" >"$root/icd/$driver.json"
    done
    # These headers alone: the C library's own would be two versions of it.
    mkdir "$root/include"
    ln -s "$root"/sid/usr/include/{vulkan,vk_video} "$root/include/"
    include=(-I"$root/include" -I"$root/sid/usr/include/libdrm")
    cc -O1 "${include[@]}" -o "$root/statistics" "$here/statistics.c" "$libraries/libvulkan.so.1" -Wl,--allow-shlib-undefined
    cc -O1 -w -shared -fPIC "${include[@]}" -o "$root/intel.so" "$here/intel.c" -ldl
    echo "$stamp" >"$root/stamp"
fi
echo "$root"
