# Three commands do everything on a fresh Debian or Ubuntu machine: `make train`, `make serve` and `make test`.
.PHONY: train web serve test fuzz bench isa setup-train setup-web setup-test

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

# The page, into web/dist: files that any server can hand out, from any path.
web: setup-web
	scripts/web.sh

serve: web
	node web/serve.mjs

# Every Vulkan driver of the machine, and SwiftShader (Chromium's) as a second vendor. Clippy is the compiler here, so that
# nothing is compiled twice: what the tests build it lints, the library for the browser too.
test: export RUSTC_WORKSPACE_WRAPPER := clippy-driver
test: export CLIPPY_ARGS := -Dwarnings
test: setup-test
	cargo fmt --check
	cargo clippy --locked --bin polystage --target x86_64-pc-windows-gnu --target aarch64-apple-darwin -- -D warnings
	cargo test --locked --benches --no-run
	scripts/isa/fetch.sh >/dev/null || echo "NOT CHECKED: what the vendors' compilers make of the kernels; they cannot be fetched here" >&2
	VK_ICD_FILENAMES="$$(scripts/drivers.sh)" cargo test --locked

# `make test` does less than a minute of this, always with the same seed.
fuzz: setup-train
	cargo test --locked --test fuzz -- --seconds $(SECONDS) --seed $(SEED)

# What the shader compilers of AMD, NVIDIA (NVK), Intel and Apple say of every kernel, without their cards, into docs/kernels.md.
isa: setup-train
	scripts/isa/fetch.sh
	cargo test --locked --test tests -- --ignored --exact isa::the_table_of_the_page_about_kernels_is_written

bench: setup-train
	VK_ICD_FILENAMES="$$(scripts/drivers.sh)" cargo bench --locked

setup-%:
	scripts/setup.sh $*
