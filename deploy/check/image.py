"""The image: what its Dockerfile does for each machine and each platform, and that its context has all that cargo asks for. Run by
deploy/check/run.

Nothing is compiled: compilers, apt-get and cargo are stand-ins that write down what they are asked.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
# As Debian, Rust and the packages of cross compilers call them.
AMD, ARM = ("amd64", "x86_64", "x86-64"), ("arm64", "aarch64", "aarch64")
PREDEFINED = re.compile(r"^ARG\s+((?:TARGET|BUILD)(?:PLATFORM|OS|ARCH|VARIANT))=", re.MULTILINE)

FAKES = {
    "apt-get": 'echo "apt-get $*" >> "$ASKED"',
    "rustup": 'echo "rustup $*" >> "$ASKED"',
    "dpkg": 'echo "$MACHINE"',
    # Only its own target is there.
    "rustc": 'case "$*" in *target-libdir*) case "$*" in *"$HOST"*) echo / ;; *) echo /nowhere ;; esac ;; *) echo "host: $HOST" ;; esac',
    "cargo": """
case $1 in
tree) echo 'linked v1.2.3'; echo 'weightd v0.1.0 (/src/daemon)' ;;
*)
  env | grep -E '^(CARGO_TARGET_|CC_|RUSTFLAGS=)' >> "$ASKED" || true
  echo "cargo $*" >> "$ASKED"
  while [ "$1" != --target ]; do shift; done
  mkdir -p "target/$2/release" && cd "target/$2/release" && touch weightd weightctl weightd-csi
  ;;
esac""",
    "readelf": 'echo "$PROGRAM_HEADERS"',
}

failed = 0


def check(what, good, got=""):
    global failed
    if not good:
        failed += 1
        print(f"FAILED {what}: {got}", file=sys.stderr)


def steps():
    """The scripts of RUN, as a shell gets them."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [re.sub(r"^(\s*--mount=\S+)+", "", line[3:]) for line in text.splitlines() if line.startswith("RUN")]


def build(work, machine, target, headers="LOAD"):
    """What was asked of the tools on `machine`, and how the last step ended."""
    environment = {"PATH": f"{work}/fakes:/usr/bin:/bin", "ASKED": f"{work}/asked", "MACHINE": machine[0], "PROFILE": "release",
                   "HOST": f"{machine[1]}-unknown-linux-gnu", "PROGRAM_HEADERS": headers, "CARGO_HOME": f"{work}/cargo"}
    if target:
        environment["TARGETARCH"] = target
    for directory in ("fakes", "src", "certificates", "docs/libc6", "docs/libgcc-s1", "docs/ca-certificates", "cargo/registry/src/index/linked-1.2.3"):
        (work / directory).mkdir(parents=True, exist_ok=True)
    for name, body in FAKES.items():
        (work / "fakes" / name).write_text("#!/bin/sh\nset -eu\n" + body)
        (work / "fakes" / name).chmod(0o755)
    for file in ("src/LICENSE", "certificates/ca-certificates.crt", *(f"docs/{one.name}/copyright" for one in (work / "docs").iterdir()),
                 "cargo/registry/src/index/linked-1.2.3/LICENSE-MIT"):
        (work / file).touch()
    # Those of the image are in a directory here.
    places = {"/etc/ssl/certs/ca-certificates.crt": f"{work}/certificates/ca-certificates.crt", "/usr/share/doc": f"{work}/docs", "/triple": f"{work}/triple",
              "/image/": f"{work}/image/", "/var/lib/apt": f"{work}/apt"}
    for script in steps():
        for place, here in places.items():
            script = script.replace(place, here)
        ran = subprocess.run(["sh", "-c", script], env=environment, cwd=work / "src", capture_output=True, text=True, check=False)
        if ran.returncode:
            break
    asked = work / "asked"
    return asked.read_text() if asked.exists() else "", ran


def platforms():
    """Each platform on each machine: its compiler, its target, three programs that are static."""
    for machine in (AMD, ARM):
        for target in (AMD, ARM):
            with tempfile.TemporaryDirectory() as work:
                work = Path(work)
                asked, ran = build(work, machine, target[0])
                title, triple = f"{target[0]} on {machine[0]}", f"{target[1]}-unknown-linux-gnu"
                check(f"{title} is built", ran.returncode == 0, ran.stderr)
                check(f"{title}: target", f"--target {triple}\n" in asked and "crt-static" in asked, asked)
                crossing = machine != target
                compiler = f"gcc-{target[2]}-linux-gnu" if crossing else "gcc"
                check(f"{title}: installs {compiler}", f" {compiler} " in asked and ("-cross" in asked) == crossing, asked)
                check(f"{title}: Rust's target", ("rustup target add " + triple in asked) == crossing, asked)
                linker = f"CARGO_TARGET_{triple.upper().replace('-', '_')}_LINKER={target[1]}-linux-gnu-gcc"
                check(f"{title}: linker", (linker in asked) == crossing and ("CC_" in asked) == crossing, asked)
                made = {str(one.relative_to(work / "image")) for one in (work / "image").rglob("*") if one.is_file()}
                expected = {"usr/local/bin/weightd", "usr/local/bin/weightctl", "usr/local/bin/weightd-csi",
                            "etc/ssl/certs/ca-certificates.crt", "licenses/LICENSE", "licenses/linked-1.2.3/LICENSE-MIT",
                            *(f"licenses/{one}/copyright" for one in ("libc6", "libgcc-s1", "ca-certificates"))}
                check(f"{title}: what the image has", made == expected, made ^ expected)
    with tempfile.TemporaryDirectory() as work:
        asked, ran = build(Path(work), ARM, None)
        check("without a platform it is the machine's", "--target aarch64-unknown-linux-gnu" in asked and not ran.returncode, asked + ran.stderr)
    for what, (target, headers) in {"s390x": ("s390x", "LOAD"), "a program that is not static": ("amd64", "INTERP")}.items():
        with tempfile.TemporaryDirectory() as work:
            check(f"{what} is refused", build(Path(work), AMD, target, headers)[1].returncode != 0)


def context(into):
    """Copies what a builder sees: what .dockerignore leaves."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for directory, inside, files in os.walk(ROOT):
        inside[:] = [name for name in inside if name not in ("target", ".git")]
        for file in files:
            path = Path(directory, file)
            name = path.relative_to(ROOT)
            # A rule for a directory holds for what is in it; the last rule that fits decides.
            heads = [name, *name.parents][:-1]
            rule = next((one for one in reversed(rules) if any(fits(one.removeprefix("!"), str(head)) for head in heads)), "!")
            if rule.startswith("!"):
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, into / name)


def fits(pattern, path):
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern.removeprefix("**/"))
    return pattern.count("/") == path.count("/") and fnmatch.fnmatchcase(path, pattern)


def everything_is_there():
    with tempfile.TemporaryDirectory() as work:
        context(Path(work))
        command = ["cargo", "metadata", "--locked", "--offline", "--format-version=1", "--no-deps"]
        asked = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False,
                               env={**os.environ, "RUSTUP_TOOLCHAIN": toolchain()})
        check("cargo takes the image's context", asked.returncode == 0, asked.stderr)
        for outside in (".git", "target", "deploy", "tests/python", "README.md"):
            check(f"the image's context is without {outside}", not (Path(work) / outside).exists())


def toolchain():
    """The image's toolchain, which is that of the developers."""
    channel = re.search(r'channel = "(.*)"', (ROOT / "rust-toolchain.toml").read_text()).group(1)
    check("the image's Rust is that of rust-toolchain.toml", f"RUST_VERSION={channel}\n" in DOCKERFILE.read_text(), channel)
    return channel


check("no default hides what the builder sets", not PREDEFINED.search(DOCKERFILE.read_text()), PREDEFINED.findall(DOCKERFILE.read_text()))
platforms()
everything_is_there()
if failed:
    sys.exit(f"check: {failed} failed")
print("check: the image's Dockerfile is good")
