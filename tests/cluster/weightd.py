"""The programs under test, as they run on a node of the cluster: daemon and plugin as `weightd-node`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from node import CALL_SECONDS, MODEL, REPO, Node, answers, stop  # noqa: E402, F401

NAMESPACE = "weightd"
# The disk that the tests run on may be fuller than a node's.
STORE = {"high_watermark_percent": 97, "low_watermark_percent": 95}


class ClusterNode(Node):
    """Kubelet's calls are the test's; the rest is as on a node."""

    def __init__(self, cluster, name, shards=2, bytes_per_shard=1_000_000, endpoint=None, account=None):
        work = cluster.directory(name)
        super().__init__(cluster.binaries, work, shards, bytes_per_shard)
        self.cluster, self.name = cluster, name
        self.given_endpoint = endpoint
        account = account or cluster.plane.account("weightd-node")
        self.kubeconfig = account.kubeconfig(self.work / "kubeconfig")
        self.running, self.settings = {}, {}
        self.plugin_options = ["--grace=2"]

    def start(self, undo, name, *arguments, **options):
        log = undo.enter_context(open(self.work / f"{name}.log", "a"))
        process = subprocess.Popen([self.binaries / name, *map(str, arguments)], stderr=log, **options)
        self.running[name] = process
        undo.callback(self.stop, name, process)
        return process

    def stop(self, name, process):
        # One that was killed and started anew has ended as it was told to.
        if self.running[name] is process:
            stop(name, process)

    def kill(self, name):
        self.running[name].kill()
        self.running[name].wait()

    def start_hub(self, undo):
        return self.given_endpoint or super().start_hub(undo)

    def start_daemon(self, undo):
        config, listens = self.work / "weightd.toml", self.work / "weightd.sock"
        settings = {"root": str(self.store), "socket": str(listens), "store": STORE} | self.settings
        settings["kubernetes"] = {"kubeconfig": str(self.kubeconfig)}
        own = {"HF_ENDPOINT": self.endpoint, "HOME": str(self.work), "AWS_EC2_METADATA_DISABLED": "true"}
        config.write_text(toml(settings))
        daemon = self.start(undo, "weightd", "--config", config, "--node-name", self.name, env=own)
        deadline = time.monotonic() + 30
        while not answers(listens):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("weightd does not listen")
            time.sleep(0.01)

    def start_plugin(self, undo):
        arguments = [f"--endpoint=unix://{self.socket}", f"--node-id={self.name}"]
        arguments += ["--daemon-socket", self.work / "weightd.sock", "--kubelet-dir", self.kubelet]
        arguments += ["--kubeconfig", self.kubeconfig, *self.plugin_options]
        self.start(undo, "weightd-csi", *arguments, env={})

    def volume(self, pod, **attributes):
        """What kubelet asks for the volume `model` of a pod that the API server has."""
        about = pod["metadata"]
        target = self.target(about["uid"])
        target.parent.mkdir(parents=True, exist_ok=True)
        keys = {"pod.uid": about["uid"], "pod.name": about["name"], "pod.namespace": about["namespace"]}
        keys |= {"ephemeral": "true", "serviceAccount.name": "default"}
        context = attributes | {f"csi.storage.k8s.io/{key}": value for key, value in keys.items()}
        request = self.csi.NodePublishVolumeRequest(
            volume_id=f"csi-{about['uid']}", target_path=str(target), readonly=True, volume_context=context
        )
        request.volume_capability.mount.SetInParent()
        request.volume_capability.access_mode.mode = self.csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
        return request

    def publish_to(self, pod, **attributes):
        self.plugin.NodePublishVolume(self.volume(pod, **attributes), timeout=CALL_SECONDS * 2)
        return self.target(pod["metadata"]["uid"])

    def logged(self, program):
        return (self.work / f"{program}.log").read_text()

    def metrics(self):
        """The lines of the daemon's metrics, where it was told to serve them."""
        with urllib.request.urlopen(f"http://{self.settings['metrics']['listen']}/metrics") as answer:
            return answer.read().decode().splitlines()

    def weightctl(self, *arguments):
        command = [self.binaries / "weightctl", "--socket", self.work / "weightd.sock", "--output", "json", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)


def toml(table, prefix=""):
    """TOML of tables, texts, numbers, truths and lists of them."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    text = "\n".join(plain) + "\n"
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{prefix}{json.dumps(key)}"
            text += f"[{name}]\n" + toml(value, f"{name}.")
    return text


def silent_origin():
    """An origin that takes connections and never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def resident_bytes(process):
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def pod(name, namespace="team-a", node="node-1", annotations=None, **spec):
    """A pod with our volume, bound to a node if that has a name."""
    about = {"name": name, "namespace": namespace, "annotations": annotations or {}}
    volume = {"name": "model", "csi": {"driver": "csi.weightd.io", "readOnly": True}}
    content = {
        "containers": [{"name": "main", "image": "example.invalid/reader:1",
                        "volumeMounts": [{"name": "model", "mountPath": "/models"}]}],
        "volumes": [volume],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
    }
    content |= {"nodeName": node} if node else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": content | spec}
