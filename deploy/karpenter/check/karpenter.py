"""deploy/karpenter: schemas, conventions, and the user data as Karpenter and cloud-init make and take it. Run by check/run."""

import base64
import logging
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import common
from common import EXAMPLES, KARPENTER, check, conform, objects, run, text_of

sys.path.append(os.environ["CLOUD_INIT"] + "/usr/lib/python3/dist-packages")
from cloudinit import handlers, helpers, user_data  # noqa: E402
from cloudinit.handlers.shell_script import ShellScriptPartHandler  # noqa: E402

FILES = ["ec2nodeclass-al2023.yaml", "ec2nodeclass-bottlerocket.yaml", "nodepool.yaml", "nodepool-auto-mode.yaml"]

# Amazon EKS user guide, "Create a Node Class for Amazon EKS": no CRD of this kind is published.
AUTO_MODE = {"role", "subnetSelectorTerms", "securityGroupSelectorTerms", "ephemeralStorage"}

# What Karpenter adds for a node, shortened.
NODE_CONFIG = """# Karpenter Generated NodeConfig
apiVersion: node.eks.aws/v1alpha1
kind: NodeConfig
spec:
  cluster:
    name: cluster
  instance:
    localStorage:
      strategy: RAID0
"""


def schemas():
    for name in FILES:
        text = text_of(KARPENTER / name)
        check(f"{name}: nothing is left to put in", not re.search(r"\$\{(CLUSTER|NODE_R|STAGE|LIST)", text), text)
        conform(name, text, "eks.amazonaws.com/v1/NodeClass")
    classes = [one for one in objects(text_of(KARPENTER / FILES[3])) if one["kind"] == "NodeClass"]
    check("Auto Mode: a NodeClass", [one["apiVersion"] for one in classes] == ["eks.amazonaws.com/v1"], classes)
    check("Auto Mode: known fields only", set(classes[0]["spec"]) <= AUTO_MODE, classes)


def conventions():
    for name in FILES[:2]:
        (node_class,) = objects(text_of(KARPENTER / name))
        check(f"{name}: RAID0", node_class["spec"].get("instanceStorePolicy") == "RAID0", node_class["spec"])
    pools = [KARPENTER / name for name in FILES[2:]] + sorted(EXAMPLES.rglob("nodepool.yaml"))
    for name, path in [(str(path.relative_to(KARPENTER.parent)), path) for path in pools]:
        (pool,) = [one for one in objects(text_of(path)) if one["kind"] == "NodePool"]
        check(f"{name}: a limit", pool["spec"].get("limits"), pool["spec"])
        template = pool["spec"]["template"]
        startup = template["spec"]["startupTaints"]
        taint = {"key": "csi.weightd.io/agent-not-ready", "effect": "NoExecute"}
        check(f"{name}: the startup taint", taint in startup, startup)
        lasting = [one["key"] for one in template["spec"].get("taints", [])]
        check(f"{name}: it is no lasting taint", taint["key"] not in lasting, lasting)
        models = template["metadata"]["annotations"]["weightd.io/prefetch"]
        check(f"{name}: the annotation", models.startswith("hf://"), models)
        after = pool["spec"]["disruption"]["consolidateAfter"]
        check(f"{name}: a warm idle node lives longer than 30 s", after not in ("0s", "30s"), after)


def merged():
    """The user data of an instance: Karpenter's own code adds its part."""
    (node_class,) = objects(text_of(KARPENTER / FILES[0]))
    with tempfile.TemporaryDirectory() as work:
        custom, config = Path(work) / "custom", Path(work) / "config"
        custom.write_text(node_class["spec"]["userData"])
        config.write_text(NODE_CONFIG)
        made = run(os.environ["MERGE"], custom, config)
    check("Karpenter merges the user data", made.returncode == 0, made.stderr)
    # Amazon EC2 user guide: user data has at most 16 KB. Karpenter's real part takes a few.
    check("user data is short", len(made.stdout) < 10_000, len(made.stdout))
    check("user data is ASCII", made.stdout.isascii())
    return made.stdout


class Unknown(logging.Handler):
    """What cloud-init says of parts that it has no handler for."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def by_cloud_init(text, scripts):
    """Runs cloud-init's own handling of user data; scripts land in a directory. Returns its warnings."""
    logger = logging.getLogger()
    told = Unknown()
    logger.addHandler(told)
    paths = helpers.Paths({"cloud_dir": str(scripts), "run_dir": str(scripts)})
    archive = user_data.UserDataProcessor(paths).process(text)
    shell = ShellScriptPartHandler(paths)
    shell.script_dir = str(scripts)
    known = helpers.ContentHandlers()
    known.register(shell)
    data = {"handlers": known, "handlerdir": str(scripts), "data": None, "frequency": "once-per-instance", "handlercount": 0,
            "excluded": []}
    handlers.walk(archive, handlers.walker_callback, data=data)
    logger.removeHandler(told)
    return told.said


def cloud_init(text, into):
    """The script that a node runs."""
    scripts = into / "scripts"
    scripts.mkdir()
    said = by_cloud_init(text, scripts)
    check("cloud-init leaves one part to nodeadm", len(said) == 1 and "application/node.eks.aws" in said[0], said)
    found = sorted(scripts.iterdir())
    check("cloud-init runs one script", len(found) == 1, found)
    script = found[0]
    check("cloud-init makes it executable", os.access(script, os.X_OK))
    check("it begins with #!", script.read_text().startswith("#!/bin/sh\n"), script.read_text()[:40])
    for shell in ("sh", "bash"):
        parsed = run(shell, "-n", script)
        check(f"{shell} -n", parsed.returncode == 0, parsed.stderr)
    linted = run(os.environ["SHELLCHECK"], "--shell=sh", "--severity=style", script)
    check("shellcheck", linted.returncode == 0, linted.stdout)
    inner = re.search(r"weightd-install <<'END'\n(.*?)\nEND\n", script.read_text(), re.DOTALL).group(1)
    linted = run(os.environ["SHELLCHECK"], "--shell=sh", "--severity=style", "-", input=inner + "\n")
    check("shellcheck of weightd-install", linted.returncode == 0, linted.stdout)
    return script


def lists():
    """Other places of a list survive Karpenter's merging, and no handler of cloud-init minds them."""
    custom = ('MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="b"\n\n--b\nContent-Type: text/x-weightd-prefetch\n\n'
              "hf://org/model\n--b--\n")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "custom").write_text(custom)
        (work / "config").write_text(NODE_CONFIG)
        text = run(os.environ["MERGE"], work / "custom", work / "config").stdout
        scripts = work / "scripts"
        scripts.mkdir()
        said = by_cloud_init(text, scripts)
        check("cloud-init passes the list's part over", not list(scripts.iterdir()) and len(said) == 2, said)
        staged = work / "list"
        staged.write_text(text)
        check("the part is there after merging", "text/x-weightd-prefetch" in text, text)


def bottlerocket():
    text = text_of(KARPENTER / FILES[1])
    (node_class,) = objects(text)
    settings = tomllib.loads(node_class["spec"]["userData"])
    container = settings["settings"]["bootstrap-containers"]["weightd"]
    check("Bottlerocket: it may fail", container["essential"] is False, container)
    staged = base64.b64decode(container["user-data"]).decode()
    check("Bottlerocket: the list", staged == "hf://org/model\n", staged)
    # The command of the comment is one that weightctl takes.
    entry = re.search(r"ENTRYPOINT \[(.*?)\]", text.replace("\n#", ""), re.DOTALL).group(1)
    words = re.findall(r'"(.*?)"', entry)
    with tempfile.TemporaryDirectory() as work:
        listed, root = Path(work) / "list", Path(work) / "store"
        listed.write_text(staged)
        paths = {words[words.index("--root") + 1]: root, words[words.index("--file") + 1]: listed}
        at = words.index("--wait-for")
        rest = [paths.get(word, word) for word in words[1:at] + words[at + 4:]]
        made = run(os.environ["WEIGHTCTL"], *rest, "--strict")
        check("Bottlerocket: it stages the list", made.returncode == 0 and len(list((root / "fetches").iterdir())) == 1, made)


def main():
    schemas()
    conventions()
    lists()
    bottlerocket()
    with tempfile.TemporaryDirectory() as work:
        cloud_init(merged(), Path(work))
    common.finish("deploy/karpenter")


if __name__ == "__main__":
    main()
