"""One node for tests: a stand-in Hub with a model, the daemon, the plugin, and calls as kubelet makes them.

Scripts that use it run in a mount namespace of their own: what a failed test leaves mounted goes with it.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import grpc_tools
from grpc_tools import protoc

REPO = "org/model"
MODEL = f"hf://{REPO}"
PROTO = Path(__file__).parents[2] / "proto"
CALL_SECONDS = 60


def same(what, got, expected):
    if got != expected:
        raise AssertionError(f"{what}: got {got!r}, expected {expected!r}")


def stubs(folder):
    """Messages and stubs of the CSI, made from the plugin's own definition."""
    folder.mkdir()
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--python_out={folder}"]
    if protoc.main([*arguments, f"--grpc_python_out={folder}", "csi/v1/csi.proto"]) != 0:
        raise RuntimeError("csi.proto cannot be compiled")
    sys.path.insert(0, str(folder))
    return importlib.import_module("csi.v1.csi_pb2"), importlib.import_module("csi.v1.csi_pb2_grpc")


class Node:
    """Runs as long as its `with` block. `binaries` is the directory of the programs under test."""

    def __init__(self, binaries, work, shards=2, bytes_per_shard=1_000_000):
        # By its real name: the kernel lists mounts by that, and kubelet knows no other.
        self.work, self.binaries = Path(work).resolve(), Path(binaries).resolve()
        self.kubelet, self.store = self.work / "kubelet", self.work / "store"
        self.origin, self.socket = self.work / "origin", self.work / "csi.sock"
        self.csi, self.stubs = stubs(self.work / "stubs")
        # A volume is for every user of a node; a temporary directory is not.
        self.work.chmod(0o755)
        (self.kubelet / "pods").mkdir(parents=True)
        command = [self.binaries / "weightd-standin", "generate", "--root", self.origin]
        command += ["--shards", str(shards), "--bytes-per-shard", str(bytes_per_shard)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def __enter__(self):
        # Else SIGTERM would end the script, and leave what it has started.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        with contextlib.ExitStack() as undo:
            undo.callback(self.unmount_all)
            self.endpoint = self.start_hub(undo)
            self.start_daemon(undo)
            self.start_plugin(undo)
            self.channel = undo.enter_context(connect(self.socket))
            grpc.channel_ready_future(self.channel).result(timeout=30)
            self.undo = undo.pop_all()
        self.plugin = self.stubs.NodeStub(self.channel)
        return self

    def __exit__(self, kind, *_):
        self.undo.close()
        if kind:
            for log in sorted(self.work.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()}", file=sys.stderr)

    def start(self, undo, name, *arguments, **options):
        log = undo.enter_context(open(self.work / f"{name}.log", "w"))
        command = [self.binaries / name, *map(str, arguments)]
        process = subprocess.Popen(command, stderr=log, **options)
        undo.callback(stop, name, process)
        return process

    def start_hub(self, undo):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        hub = self.start(undo, "weightd-standin", "hub", f"--repo={REPO}={self.origin}", **options)
        return json.loads(hub.stdout.readline())["endpoint"]

    def start_daemon(self, undo):
        config, listens = self.work / "weightd.toml", self.work / "weightd.sock"
        # A path in JSON is one in TOML.
        config.write_text(f"root = {json.dumps(str(self.store))}\nsocket = {json.dumps(str(listens))}\n")
        own = {"HF_ENDPOINT": self.endpoint, "HOME": str(self.work), "AWS_EC2_METADATA_DISABLED": "true"}
        daemon = self.start(undo, "weightd", "--config", config, env=own)
        deadline = time.monotonic() + 30
        while not answers(listens):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("weightd does not listen")
            time.sleep(0.01)

    def start_plugin(self, undo):
        arguments = [f"--endpoint=unix://{self.socket}", "--node-id=node-1"]
        arguments += ["--daemon-socket", self.work / "weightd.sock", "--kubelet-dir", self.kubelet]
        self.start(undo, "weightd-csi", *arguments, env={})

    def commit(self):
        """What the model's `main` stands at."""
        with urllib.request.urlopen(f"{self.endpoint}/api/models/{REPO}/revision/main") as answer:
            return json.load(answer)["sha"]

    def target(self, pod):
        """Where kubelet has the volume of a pod."""
        return self.kubelet / "pods" / pod / "volumes/kubernetes.io~csi/model/mount"

    def publish(self, pod, **attributes):
        """Publishes the model, and returns where it is."""
        target = self.target(pod)
        # As kubelet does: the parent is there, the target is not.
        target.parent.mkdir(parents=True)
        pod_keys = {"pod.uid": pod, "pod.name": "pod", "pod.namespace": "team-a", "ephemeral": "true"}
        context = {"source": MODEL, **attributes}
        context |= {f"csi.storage.k8s.io/{key}": value for key, value in pod_keys.items()}
        request = self.csi.NodePublishVolumeRequest(
            volume_id=f"csi-{pod}", target_path=str(target), readonly=True, volume_context=context
        )
        request.volume_capability.mount.SetInParent()
        mode = self.csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
        request.volume_capability.access_mode.mode = mode
        self.plugin.NodePublishVolume(request, timeout=CALL_SECONDS)
        return target

    def unpublish(self, pod):
        request = self.csi.NodeUnpublishVolumeRequest(
            volume_id=f"csi-{pod}", target_path=str(self.target(pod))
        )
        self.plugin.NodeUnpublishVolume(request, timeout=CALL_SECONDS)

    def mounted(self):
        """Where something is mounted below kubelet's directory, as the kernel lists it."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        targets = (line.split()[4] for line in lines)
        return [target for target in targets if target.startswith(f"{self.kubelet}/")]

    def pins(self):
        """Who holds what, as the store has it on disk."""
        kinds = [self.store / "pins/csi", self.store / "volumes/csi"]
        return sorted(str(pin.relative_to(self.store)) for kind in kinds for pin in kind.glob("*"))

    def nothing_is_left(self):
        same("mounts that are left", self.mounted(), [])
        same("pins that are left", self.pins(), [])

    def unmount_all(self):
        # The temporary directory cannot be removed with mounts in it.
        for target in reversed(self.mounted()):
            subprocess.run(["umount", "--lazy", target], check=True)


def stop(name, process):
    """One that has crashed, or does not end, makes the test fail."""
    process.terminate()
    try:
        status = process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    same(f"exit status of {name}", status, 0)


def connect(path):
    # Kubelet's word. By itself this client names the socket's path, which HTTP/2 in Rust refuses.
    return grpc.insecure_channel(f"unix:{path}", options=[("grpc.default_authority", "localhost")])


def answers(path):
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
