"""Programs of others, each from its registry, below target/bench; and our own binaries."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1]
ROOT = BENCH.parents[1]
PEERS = BENCH / "peers"
RCLONE = "v1.76.0"


class SetupError(Exception):
    """Something cannot be installed; the message says what to do."""


def run(what, *command, **options):
    print(f"bench: {what}", file=sys.stderr)
    if subprocess.run([str(part) for part in command], stdout=sys.stderr, **options).returncode:
        raise SetupError(f"{what} failed; install it yourself, or leave it out with --contenders")


def nginx(target):
    """nginx, unpacked from the Debian package: installing that would start a service."""
    found = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if found:
        return Path(found)
    binary = target / "nginx/usr/sbin/nginx"
    if not binary.exists():
        folder = target / "nginx"
        folder.mkdir(parents=True, exist_ok=True)
        run("fetching nginx", "apt-get", "download", "-q", "nginx", cwd=folder)
        (package,) = folder.glob("nginx_*.deb")
        run("unpacking nginx", "dpkg-deb", "-x", package, folder)
        package.unlink()
    return binary


def venv(target, name):
    """A virtual environment with what `peers/<name>.txt` names, made anew when that changes."""
    folder, wanted = target / name, (PEERS / f"{name}.txt").read_text()
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        run(f"making {folder.name}'s environment", sys.executable, "-m", "venv", folder)
        run(f"installing {folder.name}", folder / "bin/pip", "install", "-q", "-r", PEERS / f"{name}.txt")
        installed.write_text(wanted)
    return folder / "bin"


def s5cmd(target):
    binary = target / "bin/s5cmd"
    if not binary.exists():
        # Built in a module of our own: `go install` asks the proxy for a list of versions that it has not.
        run("building s5cmd", "go", "build", "-o", binary, "github.com/peak/s5cmd/v2", cwd=PEERS)
    return binary


def rclone(target):
    binary = target / f"rclone-{RCLONE}/rclone"
    if not binary.exists():
        environment = {**os.environ, "GOBIN": str(binary.parent)}
        module = f"github.com/rclone/rclone@{RCLONE}"
        run("building rclone, which takes minutes", "go", "install", module, env=environment)
    return binary


def cargo(binaries):
    """Our release binaries, built unless the caller names a directory that has them."""
    if binaries is None:
        packages = ["-p", "weightd", "-p", "weightd-bench"]
        run("building ours", "cargo", "build", "--release", "--locked", *packages, cwd=ROOT)
        binaries = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    for name in ("weightctl", "weightd", "weightd-bench"):
        if not (binaries / name).exists():
            raise SetupError(f"{binaries} has no {name}")
    return binaries.resolve()
