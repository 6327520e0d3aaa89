"""Pods without a node: the controller fills the shared tier meanwhile, and sums up what nodes say."""

import time

from chart import PREFETCHES, prefetch
from control_plane import eventually, same
from controller import Controller
from weightd import MODEL, ClusterNode, pod

PODS = "/api/v1/namespaces/team-a/pods"


def told(cluster, made):
    """The Events of the controller on a pod: their reasons and words."""
    query = {"fieldSelector": f"involvedObject.uid={made['metadata']['uid']}"}
    found = cluster.plane.admin.get("/api/v1/namespaces/team-a/events", **query)["items"]
    return [(event["reason"], event["message"]) for event in found
            if event["reportingComponent"] == "weightd.io/controller"]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def a_pod_without_a_node_fills_the_shared_tier(cluster, node, tier):
    """Its node finds the model there, and asks the origin for none of its bytes."""
    admin = cluster.plane.admin
    started = time.monotonic()
    made = admin.create(pod("pending", node=None, annotations={"weightd.io/model": MODEL}))
    begun = eventually("an Event", lambda: told(cluster, made), seconds=60)
    same("reasons", {reason for reason, _ in begun}, {"WeightsPrefetching"})
    size = size_of(node.origin)
    eventually("the tier has the model", lambda: size_of(tier) >= size, seconds=60)
    seconds = time.monotonic() - started
    about = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "pending", "namespace": "team-a"}}
    admin.call("POST", f"{PODS}/pending/binding", {**about, "target": {"kind": "Node", "name": node.name}})
    tree = node.publish_to(made)
    same("files", sorted(path.name for path in tree.iterdir()), sorted(path.name for path in node.origin.iterdir()))
    fetched = [line for line in node.metrics() if line.startswith("weightd_fetch_bytes_total{")]
    asked = [float(line.split()[-1]) for line in fetched if 'source="hf"' in line]
    same(f"bytes of the node from the origin ({fetched})", sum(asked), 0)
    return f"{size >> 10} KiB there {seconds:.1f} s after the pod; {told(cluster, made)[-1][1][:120]}"


def a_pod_that_asks_for_what_is_not_there_is_told(cluster):
    made = cluster.plane.admin.create(pod("hopeless", node=None, annotations={"weightd.io/model": "hf://org/none"}))
    reason, words = eventually("an Event", lambda: [each for each in told(cluster, made) if each[0] != "WeightsPrefetching"],
                               seconds=60)[0]
    same("reason", reason, "WeightsNotPrefetched")
    return words[:140]


def the_controller_sums_up(cluster):
    admin, account = cluster.plane.admin, cluster.plane.account("weightd-node")
    admin.create(prefetch("summed"))
    names = ["sum-1", "sum-2", "sum-3"]
    for name in names:
        admin.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    for name, phase in zip(names, ["Ready", "Fetching", "Ready"], strict=True):
        status = {"nodes": [{"name": name, "phase": phase, "updated": "2026-01-01T00:00:00Z"}]}
        thing = {**prefetch("summed"), "status": status}
        del thing["spec"]
        account.apply(thing, manager=f"weightd/{name}", part="/status")

    def summary():
        return (admin.get(f"{PREFETCHES}/summed").get("status") or {}).get("summary")

    started = time.monotonic()
    eventually("the summary", lambda: summary() == "2/3 ready", seconds=40)
    seconds = time.monotonic() - started
    status = admin.get(f"{PREFETCHES}/summed")["status"]
    same("entries", [entry["name"] for entry in status["nodes"]], names)
    admin.delete(f"{PREFETCHES}/summed")
    for name in names:
        admin.delete(f"/api/v1/nodes/{name}")
    return f"`2/3 ready` after {seconds:.1f} s, entries of the nodes stay"


def run(cluster, check):
    cluster.plane.namespace("team-a")
    cluster.install()
    shared = cluster.directory("shared")
    node = ClusterNode(cluster, "node-1")
    node.settings = {"shared": {"root": str(shared / "weightd")}, "metrics": {"listen": "127.0.0.1:9809"}}
    options = ["--set", f"shared.enabled=true,shared.filesystem=,shared.hostPath={shared}"]
    with node, Controller(cluster, *options, HF_ENDPOINT=node.endpoint) as controller:
        controller.start_replica("a")
        check(a_pod_without_a_node_fills_the_shared_tier, cluster, node, shared / "weightd")
        check(a_pod_that_asks_for_what_is_not_there_is_told, cluster)
        check(the_controller_sums_up, cluster)
    for name in ["pending", "hopeless"]:
        cluster.plane.admin.delete(f"{PODS}/{name}", seconds=0)
    cluster.install()
