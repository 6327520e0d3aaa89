"""Proves that a loader reads what weightctl brings: Python's safetensors opens every shard of the tree.

    python loader.py STANDIN WEIGHTCTL

Exits with 0 if every check passed.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(standin, weightctl):
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        generate = [standin, "generate", "--root", model, "--shards", "3"]
        subprocess.run(generate + ["--bytes-per-shard", "20000000"], check=True, stdout=subprocess.DEVNULL)
        hub = subprocess.Popen(
            [standin, "hub", "--repo", f"org/model={model}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        try:
            endpoint = json.loads(hub.stdout.readline())["endpoint"]
            environment = {**os.environ, "HF_ENDPOINT": endpoint}
            command = [weightctl, "--root", Path(work) / "store", "--output", "json"]
            command += ["prefetch", "hf://org/model"]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
        finally:
            hub.stdin.close()
            hub.wait()
        tree = Path(result["path"])
        origin = {str(p.relative_to(model)): digest(p) for p in model.rglob("*") if p.is_file()}
        brought = {str(p.relative_to(tree)): digest(p) for p in tree.rglob("*") if p.is_file()}
        assert brought == origin, "the tree is not the origin's"
        index = json.loads((tree / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = 0
        for shard in sorted(set(index.values())):
            with safe_open(tree / shard, framework="numpy") as opened:
                names = set(opened.keys())
                assert names == {name for name, held in index.items() if held == shard}, shard
                for name in names:
                    assert opened.get_slice(name).get_shape(), name
                tensors += len(names)
        print(f"{len(brought)} files equal, {tensors} tensors opened")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
