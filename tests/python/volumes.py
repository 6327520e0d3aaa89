"""Proves that loaders read volumes, offline: safetensors the layout flat, huggingface_hub hf-cache.

    python volumes.py DIRECTORY-OF-THE-PROGRAMS

Needs a mount namespace of its own. Exits with 0 if every check passed.
"""

import errno
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Gives numpy the bfloat16 that most weights have.
import ml_dtypes  # noqa: F401
from safetensors import safe_open

from node import REPO, Node, same

SHARDS = 3


def digests(root):
    """sha256 of every file under a directory."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors_of(shard):
    """Bytes of each tensor, read without the library: header length, header, tensors."""
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    places = {name: tensor["data_offsets"] for name, tensor in header.items()}
    return {name: content[start + begin : start + end] for name, (begin, end) in places.items()}


def check_flat(tree, origin):
    """safetensors maps every shard, and every tensor of the index has the origin's bytes."""
    same("files", digests(tree), digests(origin))
    index = json.loads((tree / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    same("shards", len(shards), SHARDS)
    for shard in shards:
        expected = tensors_of(origin / shard)
        with safe_open(tree / shard, framework="numpy") as opened:
            names = set(opened.keys())
            same(f"names in {shard}", names, {name for name, held in index.items() if held == shard})
            same(f"names in {shard} of the origin", names, set(expected))
            for name in names:
                if opened.get_tensor(name).tobytes() != expected[name]:
                    raise AssertionError(f"{name} is not the origin's")
    return f"{len(index)} tensors in {len(shards)} shards equal"


def check_links(tree, snapshot):
    """Both layouts show the same inodes: a second volume costs no second copy."""
    for path in digests(tree):
        one, other = (tree / path).stat(), (snapshot / path).stat()
        same(f"inode of {path}", (other.st_dev, other.st_ino), (one.st_dev, one.st_ino))
    return "every file is one inode in both layouts"


def fails(what, call, number):
    try:
        call()
    except OSError as error:
        same(what, errno.errorcode[error.errno], errno.errorcode[number])
    else:
        raise AssertionError(f"{what} was allowed")


def check_read_only(file):
    """Root of the namespace changes nothing."""
    before = file.read_bytes()
    fresh = file.with_name("new")
    for what, call in [
        ("open for writing", lambda: os.open(file, os.O_WRONLY)),
        ("open for reading and writing", lambda: os.open(file, os.O_RDWR)),
        ("open for appending", lambda: os.open(file, os.O_WRONLY | os.O_APPEND)),
        ("open to truncate", lambda: os.open(file, os.O_RDONLY | os.O_TRUNC)),
        ("truncate", lambda: os.truncate(file, 0)),
        ("chmod", lambda: file.chmod(0o644)),
        ("chown", lambda: os.chown(file, 0, 0)),
        ("utime", lambda: os.utime(file)),
        ("unlink", file.unlink),
        ("rename", lambda: file.rename(fresh)),
        ("link", lambda: fresh.hardlink_to(file)),
        ("create", fresh.touch),
        ("mkdir", fresh.mkdir),
    ]:
        fails(f"{what} {file.name}", call, errno.EROFS)
    with file.open("rb") as opened:
        def mapped(flags):
            return mmap.mmap(opened.fileno(), len(before), flags, mmap.PROT_READ | mmap.PROT_WRITE)

        fails(f"writable shared mapping of {file.name}", lambda: mapped(mmap.MAP_SHARED), errno.EACCES)
        fails(f"ftruncate of {file.name}", lambda: os.ftruncate(opened.fileno(), 0), errno.EINVAL)
        # Some loaders map so, and change what they have mapped: that must stay with them.
        with mapped(mmap.MAP_PRIVATE) as private:
            private[:8] = b"\0" * 8
    if file.read_bytes() != before:
        raise AssertionError(f"{file.name} was changed")


def check_cache(cache, commit, origin):
    """huggingface_hub in a process of its own: it reads its settings when it is imported."""
    environment = {
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        # Nothing is written: what is not in the volume is not there.
        "HF_HOME": "/nonexistent",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PATH": os.environ["PATH"],
    }
    reader = Path(__file__).with_name("read_cache.py")
    # With no network at all, not even loopback, nothing is read from elsewhere.
    command = ["unshare", "--net", "--", sys.executable, reader, REPO, commit]
    done = subprocess.run(
        command, env=environment, input=json.dumps(digests(origin)), text=True, timeout=120,
        stdout=subprocess.PIPE, check=True,
    )
    return done.stdout.strip()


def main(binaries):
    with tempfile.TemporaryDirectory() as work, Node(binaries, work, shards=SHARDS) as node:
        commit = node.commit()
        flat = node.publish("pod-flat")
        cache = node.publish("pod-cache", layout="hf-cache")
        snapshot = cache / "models--org--model/snapshots" / commit
        same("mounts", sorted(node.mounted()), sorted([str(flat), str(cache)]))
        print("volume flat:", check_flat(flat, node.origin))
        print("volume hf-cache:", check_cache(cache, commit, node.origin))
        print("volumes:", check_links(flat, snapshot))
        for tree in (flat, snapshot):
            check_read_only(tree / "config.json")
            check_read_only(tree / f"model-00001-of-{SHARDS:05}.safetensors")
        print("volumes: nothing can be changed")
        for pod in ("pod-flat", "pod-cache"):
            node.unpublish(pod)
            same(f"target of {pod} is left", node.target(pod).exists(), False)
        node.nothing_is_left()


if __name__ == "__main__":
    main(sys.argv[1])
