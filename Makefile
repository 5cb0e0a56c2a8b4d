# Two commands do everything on a fresh Debian or Ubuntu machine: `make train` and `make test`.
.PHONY: train test fuzz bench setup-train setup-test

SHELL := /bin/bash
# rustup puts cargo there; a shell that was open before does not know it yet.
export PATH := $(HOME)/.cargo/bin:$(PATH)
# Mesa's loader wants the folder; sessions without a desktop have none.
export XDG_RUNTIME_DIR ?= /tmp
CONFIG ?= configs/tiny.toml
SECONDS ?= 600
SEED ?= $(shell date +%s)

train: setup-train
	cargo run --release --locked -- train $(CONFIG)

# Every Vulkan driver of the machine, and SwiftShader (Chromium's) as a second vendor.
test: setup-test
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --lib --no-default-features --target wasm32-unknown-unknown -- -D warnings
	cargo clippy --locked --bin polystage --target x86_64-pc-windows-gnu --target aarch64-apple-darwin -- -D warnings
	VK_ICD_FILENAMES="$$(scripts/drivers.sh)" cargo test --locked

# `make test` does less than a minute of this, always with the same seed.
fuzz: setup-train
	cargo test --locked --test fuzz -- --seconds $(SECONDS) --seed $(SEED)

bench: setup-train
	VK_ICD_FILENAMES="$$(scripts/drivers.sh)" cargo bench --locked

setup-train:
	scripts/setup.sh train

setup-test:
	scripts/setup.sh test
