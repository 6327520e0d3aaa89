"""The chart on a real kubelet: pods whose program reads a mounted model, from their creation to their end.

The tests stand in for the scheduler and for the controller of DaemonSets only.
"""

import copy
import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import yaml
from control_plane import Processes, eventually, same
from machine import READER, SIDECAR, WEIGHTD, Machine, why_not
from weightd import NAMESPACE, STORE, pod

PODS, OURS = "/api/v1/namespaces/team-a/pods", f"/api/v1/namespaces/{NAMESPACE}/pods"
NODE = "node-1"
SHARDS, BYTES_PER_SHARD = 2, 32 << 20
MODELS = ["org/first", "org/cold", "org/async", "org/later"]
# Of the origin: else a fetch over loopback would be too short to be seen.
RATE_MBIT = 200
WAIT = ["/usr/local/bin/weightctl", "wait", "--dir", "/models", "--", "/reader", "/models"]


class Release(Processes):
    """The chart, installed on a machine, and an origin with models."""

    def __init__(self, cluster, machine):
        super().__init__(cluster.directory("release"))
        self.cluster, self.machine, self.admin = cluster, machine, cluster.plane.admin
        self.made = None
        self.models = {name: self.work / name.replace("/", ".") for name in MODELS}

    def __enter__(self):
        standin = self.cluster.binaries / "weightd-standin"
        for seed, folder in enumerate(self.models.values()):
            shape = ["--seed", str(seed), "--shards", str(SHARDS), "--bytes-per-shard", str(BYTES_PER_SHARD)]
            subprocess.run([standin, "generate", "--root", folder, *shape], check=True, stdout=subprocess.DEVNULL)
        repos = [f"--repo={name}={folder}" for name, folder in self.models.items()]
        hub = self.start("hub", standin, "hub", *repos, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        endpoints = json.loads(hub.stdout.readline())
        self.slow_down(endpoints["cdn_endpoint"])
        self.install(endpoints["endpoint"])
        return self

    def slow_down(self, endpoint):
        """What this origin sends, and nothing else."""
        port = endpoint.rsplit(":", 1)[1].strip("/")
        for words in [
            "qdisc add dev lo root handle 1: htb",
            f"class add dev lo parent 1: classid 1:4 htb rate {RATE_MBIT}mbit burst 256kb",
            f"filter add dev lo parent 1: protocol ip prio 1 u32 match ip sport {port} 0xffff flowid 1:4",
        ]:
            done = subprocess.run(["tc", *words.split()], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"the origin is not slowed down, this kernel cannot: {done.stderr.strip()}")
                return
        self.undo.callback(subprocess.run, ["tc", "qdisc", "delete", "dev", "lo", "root"], check=True)

    def install(self, endpoint):
        repository, tag = WEIGHTD.split(":")
        values = {
            "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
            "config": {"store": STORE},
            "env": [{"name": "HF_ENDPOINT", "value": endpoint}],
            "kubelet": {"dir": str(self.machine.kubelet)},
            "store": {"hostPath": str(self.machine.work / "store")},
            "runDir": str(self.machine.work / "socket"),
            "node": {"hostNetwork": True, "registrar": {"image": SIDECAR}, "livenessProbe": {"image": SIDECAR}},
        }
        file = self.work / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        things = self.cluster.install("--values", file)
        self.daemon_set = next(thing for thing in things if thing["kind"] == "DaemonSet")
        self.create()

    def create(self):
        """The pod that the controller of DaemonSets makes for a node."""
        thing = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(self.daemon_set["spec"]["template"])}
        thing["metadata"] |= {"name": "weightd-node-1", "namespace": NAMESPACE}
        thing["spec"]["nodeName"] = NODE
        self.made = self.admin.create(thing)

    def until_ready(self):
        def ready():
            status = self.admin.get(f"{OURS}/weightd-node-1")["status"]
            containers = status.get("containerStatuses", [])
            return len(containers) == 4 and all(each["ready"] for each in containers)

        started = time.monotonic()
        eventually("all containers of the DaemonSet's pod are ready", ready, seconds=90, pause=0.2)
        return time.monotonic() - started

    def drivers(self):
        node = self.admin.get(f"/apis/storage.k8s.io/v1/csinodes/{NODE}")
        return [driver["name"] for driver in node["spec"]["drivers"] or []]

    def digests(self, model):
        folder = self.models[model]
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def mounted(self, made):
        return [target for target in self.machine.mounted() if made["metadata"]["uid"] in target]

    def read(self, thing, model):
        """Runs a pod until its program has read the model. Gives seconds from its creation: container made, first
        byte, last byte."""
        before = time.time()
        made = self.admin.create(thing)

        def reported():
            lines = self.machine.output(made)
            return next((json.loads(line) for line in lines if line.startswith("{")), None)

        report = eventually(f"{thing['metadata']['name']} has read {model}", reported, seconds=120)
        # A volume that is filled while it is mounted says of itself how far it is.
        read = {name: digest for name, digest in report["digests"].items() if not name.startswith(".weightd/")}
        same("what the pod read", read, self.digests(model))
        same("the pod may write to the model", report["writable"], False)
        times = [self.machine.container_made(made), report["first_byte"], report["finished"]]
        return made, [each - before for each in times]

    def delete(self, made):
        """Deletes a pod. Gives the seconds until it was gone; then nothing of it is mounted any more."""
        about = made["metadata"]
        path = f"/api/v1/namespaces/{about['namespace']}/pods/{about['name']}"
        self.admin.delete(path)
        started = time.monotonic()
        eventually(f"{about['name']} is gone", lambda: not self.admin.exists(path), seconds=60)
        same("mounts of the pod", self.mounted(made), [])
        return time.monotonic() - started

    def timed(self, name, model, **options):
        made, (container, first, last) = self.read(reader(name, model, **options), model)
        gone = self.delete(made)
        return f"container after {container:.2f} s, first byte {first:.2f} s, last {last:.2f} s; gone in {gone:.2f} s"


def reader(name, model=None, attributes=None, image=READER, command=None):
    """A pod of the host's network, so that none has to be set up."""
    thing = pod(name, annotations={"weightd.io/model": f"hf://{model}"} if model else {}, hostNetwork=True)
    container = thing["spec"]["containers"][0]
    container |= {"image": image, "imagePullPolicy": "Never"}
    container |= {"command": command} if command else {"args": ["/models"]}
    thing["spec"]["terminationGracePeriodSeconds"] = 5
    thing["spec"]["volumes"][0]["csi"]["volumeAttributes"] = attributes or {}
    thing["spec"]["tolerations"] = [{"operator": "Exists"}]
    return thing


def the_chart_serves_a_node(release):
    """From the applied objects to a driver that kubelet knows, each container well by its own probes."""
    seconds = release.until_ready()
    eventually("CSINode lists the driver", lambda: "csi.weightd.io" in release.drivers(), seconds=60)
    return f"4 containers ready after {seconds:.1f} s, CSINode lists csi.weightd.io"


def the_startup_taint_is_removed(release):
    """Kubelet registered the node with it, as Karpenter has it done."""
    def untainted():
        spec = release.admin.get(f"/api/v1/nodes/{NODE}")["spec"]
        return not any(taint["key"] == "csi.weightd.io/agent-not-ready" for taint in spec.get("taints", []))

    eventually("the taint is gone", untainted, seconds=30)
    return "by the daemon, as the driver was registered"


def a_first_pod(release):
    """What is slow only once is not in the times of the others."""
    return release.timed("first", "org/first")


def a_cold_model(release):
    return release.timed("cold", "org/cold")


def a_cached_model(release):
    return release.timed("cached", "org/cold")


ASYNC = {"attributes": {"mode": "async"}, "image": WEIGHTD, "command": WAIT}


def a_cold_model_async(release):
    return release.timed("cold-async", "org/async", **ASYNC)


def a_cached_model_async(release):
    return release.timed("cached-async", "org/async", **ASYNC)


def the_pod_is_told_what_is_wrong(release):
    """What `kubectl describe pod` shows of a volume without a model."""
    made = release.admin.create(reader("wrong"))

    def told():
        query = {"fieldSelector": f"involvedObject.uid={made['metadata']['uid']},reason=FailedMount"}
        events = release.admin.get("/api/v1/namespaces/team-a/events", **query)["items"]
        return next((event["message"] for event in events if "weightd.io/model" in event["message"]), None)

    message = eventually("an Event with the remedy", told, seconds=60)
    release.delete(made)
    return message.splitlines()[0][:160]


def processes(name):
    """The ids of the programs that are called so; in containers, too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "exe").endswith(f"/usr/local/bin/{name}"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def crashes_are_not_seen(release):
    """A pod that runs keeps its model, and is ended, though plugin and daemon were killed."""
    made, _ = release.read(reader("survivor", "org/cold"), "org/cold")
    before = release.mounted(made)
    same("mounts", len(before), 1)
    for name in ["weightd-csi", "weightd"]:
        [old] = processes(name)
        os.kill(old, signal.SIGKILL)
        eventually(f"kubelet starts {name} again", lambda name=name, old=old: processes(name) not in ([], [old]), seconds=60)
        same(f"mounts after {name} was killed", release.mounted(made), before)
    release.until_ready()
    gone = release.delete(made)
    return f"the mount stayed; the pod was gone {gone:.1f} s after its deletion"


def an_upgrade_is_not_seen(release):
    """The DaemonSet's pod is replaced while a pod has its model, and a new pod gets another one."""
    made, _ = release.read(reader("stays", "org/cold"), "org/cold")
    before = release.mounted(made)
    started = time.monotonic()
    release.delete(release.made)
    same("mounts without the DaemonSet's pod", release.mounted(made), before)
    release.create()
    release.until_ready()
    away = time.monotonic() - started
    same("mounts after the upgrade", release.mounted(made), before)
    later, _ = release.read(reader("later", "org/later"), "org/later")
    release.delete(later)
    release.delete(made)
    return f"replaced in {away:.1f} s, mounts stayed"


def run(cluster, check):
    why = why_not()
    if why:
        check.leave_out("kubelet", why)
        return
    cluster.plane.namespace("team-a")
    with Machine(cluster, NODE) as machine, Release(cluster, machine) as release:
        check(the_chart_serves_a_node, release)
        check(the_startup_taint_is_removed, release)
        for test in [a_first_pod, a_cold_model, a_cached_model, a_cold_model_async, a_cached_model_async,
                     the_pod_is_told_what_is_wrong, crashes_are_not_seen, an_upgrade_is_not_seen]:
            check(test, release)
        release.delete(release.made)
