"""A real kubelet runs pods whose program reads a mounted model, from its creation to its end."""

import hashlib
import json
import subprocess
import time

from control_plane import eventually, same
from machine import READER, WEIGHTD, Machine, why_not
from weightd import ClusterNode, pod

PODS = "/api/v1/namespaces/team-a/pods"
SHARDS, BYTES_PER_SHARD = 2, 32 << 20


class Node(ClusterNode):
    """Daemon and plugin beside a kubelet, in its directories."""

    def __init__(self, cluster, machine):
        super().__init__(cluster, machine.name, SHARDS, BYTES_PER_SHARD)
        self.kubelet = machine.kubelet
        self.socket = machine.kubelet / "plugins/csi.weightd.io/csi.sock"
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        self.models = {"org/model": self.origin}
        for seed, name in enumerate(["org/cold", "org/async"], 2):
            self.models[name] = self.work / name.replace("/", ".")
            command = [self.binaries / "weightd-standin", "generate", "--root", self.models[name], "--seed", str(seed)]
            command += ["--shards", str(SHARDS), "--bytes-per-shard", str(BYTES_PER_SHARD)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def start_hub(self, undo):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        repos = [f"--repo={name}={folder}" for name, folder in self.models.items()]
        hub = self.start(undo, "weightd-standin", "hub", *repos, **options)
        return json.loads(hub.stdout.readline())["endpoint"]

    def digests(self, model):
        folder = self.models[model]
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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


def run_pod(cluster, machine, node, thing, model):
    """Runs it until its program has read the model. Gives seconds from its creation: start of the program, first
    byte, last byte."""
    before = time.time()
    made = cluster.plane.admin.create(thing)

    def reported():
        lines = machine.output(made)
        return next((json.loads(line) for line in lines if line.startswith("{")), None)

    report = eventually(f"{thing['metadata']['name']} has read {model}", reported, seconds=120)
    # A volume that is filled while it is mounted says of itself how far it is.
    read = {name: digest for name, digest in report["digests"].items() if not name.startswith(".weightd/")}
    same("what the pod read", read, node.digests(model))
    same("the pod may write to the model", report["writable"], False)
    return made, [report[key] - before for key in ["started", "first_byte", "finished"]]


def delete(cluster, machine, made):
    about = made["metadata"]
    cluster.plane.admin.delete(f"{PODS}/{about['name']}")
    started = time.monotonic()
    eventually("the pod is gone", lambda: not cluster.plane.admin.exists(f"{PODS}/{about['name']}"), seconds=60)
    same("mounts of the pod", [target for target in machine.mounted() if about["uid"] in target], [])
    return time.monotonic() - started


def timed(cluster, machine, node, name, model, **options):
    made, (started, first, last) = run_pod(cluster, machine, node, reader(name, model, **options), model)
    gone = delete(cluster, machine, made)
    return f"{name}: program started {started:.2f} s, first byte {first:.2f} s, last {last:.2f} s, gone {gone:.2f} s"


def kubelet_registers_the_plugin(cluster, machine):
    """As node-driver-registrar does it."""
    def drivers():
        node = cluster.plane.admin.get(f"/apis/storage.k8s.io/v1/csinodes/{machine.name}")
        return [driver["name"] for driver in node["spec"]["drivers"] or []]

    eventually("CSINode lists the driver", lambda: "csi.weightd.io" in drivers(), seconds=60)
    return "CSINode lists csi.weightd.io"


def a_cold_model(cluster, machine, node):
    return timed(cluster, machine, node, "cold", "org/cold")


def a_cached_model(cluster, machine, node):
    return timed(cluster, machine, node, "cached", "org/cold")


WAIT = ["/weightctl", "wait", "--dir", "/models", "--", "/reader", "/models"]


def a_cold_model_async(cluster, machine, node):
    options = {"attributes": {"mode": "async"}, "image": WEIGHTD, "command": WAIT}
    return timed(cluster, machine, node, "cold-async", "org/async", **options)


def a_cached_model_async(cluster, machine, node):
    options = {"attributes": {"mode": "async"}, "image": WEIGHTD, "command": WAIT}
    return timed(cluster, machine, node, "cached-async", "org/async", **options)


def the_pod_is_told_what_is_wrong(cluster, machine, node):
    """What `kubectl describe pod` shows of a volume without a model."""
    admin = cluster.plane.admin
    made = admin.create(reader("wrong"))

    def told():
        query = {"fieldSelector": f"involvedObject.uid={made['metadata']['uid']},reason=FailedMount"}
        events = admin.get("/api/v1/namespaces/team-a/events", **query)["items"]
        return next((event["message"] for event in events if "weightd.io/model" in event["message"]), None)

    message = eventually("an Event with the remedy", told, seconds=60)
    delete(cluster, machine, made)
    return message.splitlines()[0][:160]


def a_restart_of_the_plugin_is_not_seen(cluster, machine, node):
    """A pod that runs reads on, and is ended, though the plugin has been killed and is back."""
    made, _ = run_pod(cluster, machine, node, reader("survivor", "org/cold"), "org/cold")
    mounted = [target for target in machine.mounted() if made["metadata"]["uid"] in target]
    same("mounts", len(mounted), 1)
    node.kill("weightd-csi")
    same("mounts without the plugin", [target for target in machine.mounted() if target in mounted], mounted)
    node.start_plugin(node.undo)
    gone = delete(cluster, machine, made)
    return f"the mount stayed; the pod was gone {gone:.2f} s after its deletion"


def run(cluster, check):
    why = why_not()
    if why:
        check.leave_out("kubelet", why)
        return
    cluster.install()
    cluster.plane.namespace("team-a")
    with Machine(cluster, "node-1") as machine, Node(cluster, machine) as node:
        registry = machine.kubelet / "plugins_registry"
        machine.start("registrar", cluster.tools / "registrar", "--csi-address", node.socket,
                      "--kubelet-registration-path", node.socket, "--plugin-registration-path", registry)
        check(kubelet_registers_the_plugin, cluster, machine)
        for test in [a_cold_model, a_cached_model, a_cold_model_async, a_cached_model_async,
                     the_pod_is_told_what_is_wrong, a_restart_of_the_plugin_is_not_seen]:
            check(test, cluster, machine, node)
