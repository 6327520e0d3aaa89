# What the tests that need other programs have in common. To be sourced, from the project's root.
# shellcheck shell=bash

# What builds where Go is too old to fetch a newer one by itself.
readonly GO_VERSION=1.26.8

target=${CARGO_TARGET_DIR:-target}
venv=$target/outside-venv

# install WHAT PACKAGE...
install() {
  echo "tests: $1 is missing, installing it"
  shift
  local sudo=()
  [[ $EUID -eq 0 ]] || sudo=(sudo)
  "${sudo[@]}" apt-get update -q
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
}

# The environment for Python below target/, with what the files named hold.
make_venv() {
  if ! "$venv/bin/python" -c '' 2>/dev/null && ! python3 -m venv "$venv" 2>/dev/null; then
    install "python3 with venv" python3 python3-venv
    rm -rf "$venv"
    python3 -m venv "$venv"
  fi
  "$venv/bin/pip" install --quiet --disable-pip-version-check "${@/#/--requirement=}"
}

# Sets GO to one that is new enough, or that fetches what is.
find_go() {
  command -v go >/dev/null || install Go golang-go ca-certificates
  GO=go
  # Since 1.21, Go fetches the newer Go that a module needs. Before that the same is done here.
  if [[ -z $(go env GOTOOLCHAIN) ]]; then
    local module toolchain
    module=golang.org/toolchain@v0.0.1-go$GO_VERSION.$(go env GOHOSTOS)-$(go env GOHOSTARCH)
    go mod download "$module"
    toolchain=$(go env GOMODCACHE)/$module
    # A module's files have no right to be run.
    chmod +x "$toolchain"/bin/* "$toolchain"/pkg/tool/*/*
    GO=$toolchain/bin/go
  fi
}
