#!/usr/bin/env bash
# Builds web/dist: the library for the browser, its JavaScript, the page. Argument: the profile, `web` (small, takes minutes)
# or `quick` (for tests).
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:-web}

cargo build --locked --lib --profile "$profile" --no-default-features --target wasm32-unknown-unknown
cargo run --locked --quiet --package bindings -- "target/wasm32-unknown-unknown/$profile/polystage.wasm" web/pkg
cd web
[ -d node_modules ] && [ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-audit --no-fund
npm run --silent build
