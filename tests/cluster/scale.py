"""A large cluster: what daemon and plugin of one node cost its API server and the node, when nothing happens."""

import collections
import time

from chart import PREFETCHES, prefetch
from control_plane import eventually, same
from warm import make_node, pins, register_driver, remove_node
from weightd import MODEL, NAMESPACE, ClusterNode, pod, resident_bytes

NODE, NODES, PODS, OBJECTS = "node-1", 200, 5000, 20
USER = f"system:serviceaccount:{NAMESPACE}:weightd-node"
# What the project promises.
REQUESTS_PER_MINUTE = 2
WINDOW_SECONDS = 70
MIB = 1 << 20


def crowd(cluster):
    """Nodes, pods and objects as a large cluster has them."""
    admin = cluster.plane.admin
    cluster.plane.namespace("crowd")
    started = time.monotonic()
    names = [f"crowd-{number}" for number in range(1, NODES)]
    labels = {f"example.com/label-{number}": "a-value-of-some-length" for number in range(30)}
    admin.all({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}} for name in names)
    env = [{"name": f"SETTING_{number}", "value": "x" * 60} for number in range(20)]
    pods = []
    for number in range(PODS):
        thing = pod(f"pod-{number}", "crowd", [NODE, *names][number % NODES])
        thing["spec"]["containers"][0]["env"] = env
        pods.append(thing)
    admin.all(pods)
    admin.all(prefetch(f"crowd-{number}", nodeSelector={"matchLabels": {"pool": "none"}}) for number in range(OBJECTS))
    return f"{NODES} nodes, {PODS} pods, {OBJECTS} ModelPrefetch made in {time.monotonic() - started:.0f} s"


def asked(cluster):
    """Requests of our service account so far, by what they were."""
    mine = (event for event in cluster.plane.audit() if event["user"]["username"] == USER)
    return collections.Counter(
        f"{event['verb']} {event['objectRef']['resource']}" for event in mine if event.get("objectRef")
    )


def an_idle_node_asks_little(cluster, node):
    """With a volume mounted and a model kept, over more than a minute."""
    admin, at_start = cluster.plane.admin, asked(cluster)
    admin.create(prefetch("kept", source=MODEL))
    eventually("the model is kept", lambda: pins(node), seconds=60)
    made = admin.create(pod("reads", annotations={"weightd.io/model": MODEL}))
    node.publish_to(made)
    # Labels, status and what the start needs are written by now.
    time.sleep(40)
    before = asked(cluster)
    time.sleep(WINDOW_SECONDS)
    during = asked(cluster) - before
    requests = sum(during.values()) * 60 / WINDOW_SECONDS
    what = ", ".join(f"{count} × {name}" for name, count in during.items())
    if requests > REQUESTS_PER_MINUTE:
        raise AssertionError(f"{requests:.1f} requests per minute of an idle node: {what}")
    admin.delete(f"{PREFETCHES}/kept")
    return f"{requests:.1f} requests per minute ({what}); {sum((before - at_start).values())} to start with"


def an_audit_log_tells_the_programs_apart(cluster, _):
    mine = (event for event in cluster.plane.audit() if event["user"]["username"] == USER)
    agents = {event.get("userAgent", "").split("/")[0] for event in mine}
    # Tests use the account, too.
    ours = sorted(agents & {"weightd", "weightd-csi"})
    same("programs by their user agent", ours, ["weightd", "weightd-csi"])
    return ", ".join(ours)


def memory_does_not_grow_with_the_cluster(_, node):
    sizes = {name: resident_bytes(node.running[name]) for name in ["weightd", "weightd-csi"]}
    for name, limit in [("weightd", 150), ("weightd-csi", 80)]:
        same(f"{name} below {limit} MiB of memory (it has {sizes[name] // MIB})", sizes[name] < limit * MIB, True)
    return ", ".join(f"{name} has {size / MIB:.0f} MiB" for name, size in sizes.items()) + " (built for tests)"


def run(cluster, check):
    cluster.install()
    cluster.plane.namespace("team-a")
    check(crowd, cluster)
    make_node(cluster, NODE, taints=["csi.weightd.io/agent-not-ready"])
    node = ClusterNode(cluster, NODE)
    # As the chart has it: the others compare mounts and pins more often than a node does.
    node.plugin_options = []
    with node:
        register_driver(cluster, NODE)
        check(an_idle_node_asks_little, cluster, node)
        check(an_audit_log_tells_the_programs_apart, cluster, node)
        check(memory_does_not_grow_with_the_cluster, cluster, node)
    remove_node(cluster, NODE)
