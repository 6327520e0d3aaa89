"""What the checks share: telling what failed, and the manifests."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parents[2]
KARPENTER = DEPLOY / "karpenter"
EXAMPLES = DEPLOY / "examples"

# What an operator puts in for `envsubst`.
VALUES = {
    "CLUSTER_NAME": "cluster",
    "NODE_ROLE": "NodeRole",
    "WEIGHTCTL": "registry.example/weightd@sha256:" + "0" * 64,
    "STAGE_IMAGE": "registry.example/stage:1",
    "LIST": "aGY6Ly9vcmcvbW9kZWwK",
}

failed = 0


def check(what, good, got=""):
    global failed
    if not good:
        failed += 1
        print(f"FAILED {what}: {got}", file=sys.stderr)


def finish(name):
    print(f"check: {name}: {'FAILED' if failed else 'ok'}")
    sys.exit(1 if failed else 0)


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, check=False, **options)


def text_of(path, **values):
    """The manifest as `envsubst` with just these variables makes it."""
    text = path.read_text()
    for name, value in {**VALUES, **values}.items():
        text = text.replace("${" + name + "}", value)
    return text


def objects(text):
    return [one for one in yaml.safe_load_all(text) if one]


def conform(name, text, *skipped):
    """Every object is what its schema says; kinds that nobody publishes a schema of are skipped by name."""
    schemas = os.environ["SCHEMAS"] + "/{{ .ResourceKind }}{{ .KindSuffix }}.json"
    command = [os.environ["KUBECONFORM"], "-strict", "-summary", "-schema-location", schemas]
    if skipped:
        command += ["-skip", ",".join(skipped)]
    made = run(*command, input=text)
    check(f"{name}: kubeconform", made.returncode == 0, made.stdout + made.stderr)
