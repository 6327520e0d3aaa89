"""What the daemon does with its Node: the startup taint, the models it is to keep, and labels for placement."""

import time

from api import Refused
from chart import PREFETCHES, prefetch
from control_plane import eventually, same
from weightd import MODEL, ClusterNode

NODE, NODES = "node-1", "/api/v1/nodes"
CSI_NODES = "/apis/storage.k8s.io/v1/csinodes"
STARTUP, FOREIGN = "csi.weightd.io/agent-not-ready", "example.com/other"
LABEL = "model.weightd.io/hf.org.model"


def make_node(cluster, name, taints=(), annotations=None, labels=None):
    """As Karpenter and kubelet make one whose driver has not registered yet."""
    admin = cluster.plane.admin
    about = {"name": name, "annotations": annotations or {}, "labels": labels or {}}
    effects = {STARTUP: "NoExecute"}
    taints = [{"key": key, "effect": effects.get(key, "NoSchedule")} for key in taints]
    admin.create({"apiVersion": "v1", "kind": "Node", "metadata": about, "spec": {"taints": taints}})
    admin.create({"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": name},
                  "spec": {"drivers": []}})


def register_driver(cluster, name):
    driver = {"name": "csi.weightd.io", "nodeID": name, "topologyKeys": None}
    cluster.plane.admin.merge(f"{CSI_NODES}/{name}", {"spec": {"drivers": [driver]}})


def remove_node(cluster, name):
    for path in [f"{NODES}/{name}", f"{CSI_NODES}/{name}"]:
        cluster.plane.admin.delete(path)


def node_of(cluster):
    return cluster.plane.admin.get(f"{NODES}/{NODE}")


def taints_of(cluster):
    return {taint["key"] for taint in node_of(cluster)["spec"].get("taints", [])}


def pins(node):
    """Who keeps the model."""
    return sorted(holder for found in node.weightctl("ls") for holder in found["pinned_by"])


def the_startup_taint_goes_when_the_driver_is_there(cluster, _):
    time.sleep(1.5)
    same("taints before the driver has registered", taints_of(cluster) >= {STARTUP, FOREIGN}, True)
    register_driver(cluster, NODE)
    started = time.monotonic()
    eventually("the taint is gone", lambda: STARTUP not in taints_of(cluster))
    same("another's taint", FOREIGN in taints_of(cluster), True)
    return f"{(time.monotonic() - started) * 1000:.0f} ms after CSINode listed the driver; another's taint stays"


def an_annotation_of_the_node_keeps_a_model(cluster, node):
    admin = cluster.plane.admin
    started = time.monotonic()
    annotation = {"metadata": {"annotations": {"weightd.io/prefetch": f" {MODEL} ,\n"}}}
    admin.merge(f"{NODES}/{NODE}", annotation)
    eventually("the model is here and kept", lambda: pins(node))
    seconds = time.monotonic() - started
    eventually("the label", lambda: node_of(cluster)["metadata"]["labels"].get(LABEL) == node.commit(), seconds=60)
    admin.merge(f"{NODES}/{NODE}", {"metadata": {"annotations": {"weightd.io/prefetch": None}}})
    eventually("the model is let go", lambda: not pins(node))
    return f"kept {seconds:.1f} s after the annotation, label {LABEL}; let go as the annotation went"


def a_wrong_annotation_is_told_on_the_node(cluster, _):
    admin, wrong = cluster.plane.admin, ["hf:/typo", "/models/x"]
    admin.merge(f"{NODES}/{NODE}", {"metadata": {"annotations": {"weightd.io/prefetch": ",".join(wrong)}}})

    def told():
        events = admin.get("/api/v1/namespaces/default/events", fieldSelector=f"involvedObject.name={NODE}")
        return [event["message"] for event in events["items"] if event["reason"] == "PrefetchInvalid"]

    notes = eventually("an Event of the node", told)
    same("what it names", [text in notes[0] for text in wrong], [True, True])
    admin.merge(f"{NODES}/{NODE}", {"metadata": {"annotations": {"weightd.io/prefetch": None}}})
    return f"in {len(notes)} Event: {notes[0][:100]}"


def entries(cluster, name):
    status = cluster.plane.admin.get(f"{PREFETCHES}/{name}").get("status") or {}
    return {entry["name"]: entry for entry in status.get("nodes", [])}


def an_object_keeps_a_model(cluster, node):
    admin = cluster.plane.admin
    started = time.monotonic()
    admin.create(prefetch("mine", source=MODEL, nodeSelector={"matchLabels": {"pool": "gpu"}}))
    admin.create(prefetch("others", source=MODEL, nodeSelector={"matchLabels": {"pool": "cpu"}}))
    entry = eventually("the status says Ready", lambda: ready(cluster), seconds=60)
    seconds = time.monotonic() - started
    same("revision", entry["revision"], node.commit())
    same("bytes", (entry["bytesDone"], entry["bytes"] > 2_000_000), (entry["bytes"], True))
    same("pinned", len(pins(node)), 1)
    managers = {field["manager"] for field in admin.get(f"{PREFETCHES}/mine")["metadata"]["managedFields"]
                if field.get("subresource") == "status"}
    same("who has written the status", managers, {f"weightd/{NODE}"})
    same("entries where the node is not selected", entries(cluster, "others"), {})
    admin.delete(f"{PREFETCHES}/mine")
    eventually("the model is let go", lambda: not pins(node))
    admin.delete(f"{PREFETCHES}/others")
    return f"Ready in its status after {seconds:.1f} s; let go as the object went"


def ready(cluster):
    entry = entries(cluster, "mine").get(NODE)
    return entry if entry and entry["phase"] == "Ready" else None


def an_object_that_selects_no_longer_lets_go(cluster, node):
    admin = cluster.plane.admin
    admin.create(prefetch("mine", source=MODEL))
    eventually("the status says Ready", lambda: ready(cluster), seconds=60)
    admin.merge(f"{PREFETCHES}/mine", {"spec": {"nodeSelector": {"matchLabels": {"pool": "cpu"}}}})
    eventually("the model is let go", lambda: not pins(node))
    eventually("its entry is gone", lambda: NODE not in entries(cluster, "mine"))
    admin.delete(f"{PREFETCHES}/mine")
    return "model and entry"


def a_model_that_is_not_there_says_so(cluster, _):
    cluster.plane.admin.create(prefetch("mine", source="hf://org/none"))

    def told():
        entry = entries(cluster, "mine").get(NODE)
        return entry if entry and entry["phase"] in ("Failed", "Waiting") and entry.get("message") else None

    entry = eventually("the status says why", told, seconds=60)
    cluster.plane.admin.delete(f"{PREFETCHES}/mine")
    return f"{entry['phase']}: {entry['message'].splitlines()[0][:120]}"


def what_went_while_no_daemon_ran_is_let_go(cluster, node):
    admin = cluster.plane.admin
    admin.create(prefetch("mine", source=MODEL))
    eventually("the status says Ready", lambda: ready(cluster), seconds=60)
    node.kill("weightd")
    admin.delete(f"{PREFETCHES}/mine")
    node.start_daemon(node.undo)
    eventually("the model is let go", lambda: not pins(node), seconds=60)
    return "after a daemon that was killed came back"


def run(cluster, check):
    cluster.install()
    make_node(cluster, NODE, taints=[STARTUP, FOREIGN], labels={"pool": "gpu"})
    try:
        with ClusterNode(cluster, NODE) as node:
            for test in [the_startup_taint_goes_when_the_driver_is_there, an_annotation_of_the_node_keeps_a_model,
                         a_wrong_annotation_is_told_on_the_node, an_object_keeps_a_model,
                         an_object_that_selects_no_longer_lets_go, a_model_that_is_not_there_says_so,
                         what_went_while_no_daemon_ran_is_let_go]:
                check(test, cluster, node)
    finally:
        try:
            remove_node(cluster, NODE)
        except Refused as error:
            print(f"not cleaned up: {error}")
