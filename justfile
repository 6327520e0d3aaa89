# `just` lists the recipes; `.ci/run` does not need it.

_default:
    @just --list --unsorted

# Format, lints, dependency rules
check:
    .ci/run fmt clippy deny

# Unit and end-to-end tests on loopback
test *arguments:
    cargo test --workspace {{ arguments }}

# The tests that need programs other than ours
e2e-outside:
    tests/outside/run

# A real API server and a kubelet: `just cluster rights warm`
cluster *arguments:
    tests/cluster/run {{ arguments }}

# Chart, manifests, alerts and dashboard: `UPDATE=1 just deploy` makes the manifests anew
deploy:
    deploy/check/run

# Several hosts on one machine, as root: `just hosts eight killed --rate 25`
hosts *arguments:
    cargo build -p weightd -p weightd-standin
    python3 tests/python/hosts.py target/debug {{ arguments }}

# Measure weightd, its peers and the machine's ceilings in one run: `just bench --cases shards --json figures.json`
bench *arguments:
    python3 tests/bench/bench.py {{ arguments }}

# Simulate fleets that fill one shared tier together: `just bench-fleet --nodes 8,100 --policy fastest`
bench-fleet *arguments:
    cargo bench -p weightd --bench fleet -- {{ arguments }}

# Measure how long kubelet waits for a cached model: `just bench-publish --calls 1000`
bench-publish *arguments:
    cargo build --release -p weightd
    cargo bench -p weightd-csi --bench publish -- {{ arguments }}

# The main job, offline, on an embedded origin
demo *arguments:
    cargo run --release -p weightd --bin weightctl -- demo {{ arguments }}

# `weightctl` without shared libraries: it runs in any container (`weightctl wait`)
static:
    RUSTFLAGS="-C target-feature=+crt-static" cargo build --release -p weightd --bin weightctl \
        --target "$(rustc -vV | sed -n 's/^host: //p')"

# API documentation; a warning fails
docs:
    .ci/run docs
