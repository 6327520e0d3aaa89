"""The plugin asks a real API server which model a pod wants, and which pods there are."""

import time

import grpc
from control_plane import eventually, same
from weightd import MODEL, NAMESPACE, ClusterNode, pod, silent_origin

PODS = "/api/v1/namespaces/team-a/pods"


def says(what, error, code, *words):
    same(f"code of {what}", error.code(), code)
    for word in words:
        if word not in error.details():
            raise AssertionError(f"{what}: `{word}` is missing in: {error.details()}")


def refused(node, thing, code, *words):
    try:
        node.publish_to(thing)
    except grpc.RpcError as error:
        says(thing["metadata"]["name"], error, code, *words)
    else:
        raise AssertionError(f"{thing['metadata']['name']} was published")


def the_annotation_names_the_model(cluster, node):
    admin = cluster.plane.admin
    for name, annotations in {
        "general": {"weightd.io/model": MODEL},
        "own": {"weightd.io/model": "hf://org/none", "weightd.io/volume.model": MODEL},
    }.items():
        made = admin.create(pod(name, annotations=annotations))
        tree = node.publish_to(made)
        files = sorted(path.name for path in node.origin.iterdir())
        same(f"files of {name}", sorted(path.name for path in tree.iterdir()), files)
    bare = admin.create(pod("bare"))
    refused(node, bare, grpc.StatusCode.INVALID_ARGUMENT, "weightd.io/model")
    admin.delete(f"{PODS}/bare", seconds=0)
    return "by the pod's annotation and by the volume's own; without one the pod is told of it"


def only_the_pod_itself_counts(cluster, node):
    made = cluster.plane.admin.create(pod("twin", annotations={"weightd.io/model": MODEL}))
    made["metadata"]["uid"] = "another-uid"
    refused(node, made, grpc.StatusCode.ABORTED, "is gone")
    return "another pod of the same name gets nothing"


def only_reads_are_asked_for(cluster, _):
    user = f"system:serviceaccount:{NAMESPACE}:weightd-node"
    eventually("audit", lambda: any(event["user"]["username"] == user for event in cluster.plane.audit()))
    events = [event for event in cluster.plane.audit() if event["user"]["username"] == user]
    pods = [event for event in events if event.get("objectRef", {}).get("resource") == "pods"]
    same("verbs on pods", {event["verb"] for event in pods} - {"get", "list", "watch"}, set())
    denied = [event["requestURI"] for event in events if event.get("responseStatus", {}).get("code") == 403]
    same("requests of the plugin and daemon that were denied", denied, [])
    return f"{len(pods)} requests for pods, none of them denied"


def a_pod_that_is_gone_loses_its_volume(cluster, node):
    admin = cluster.plane.admin
    admin.create(pod("stays"))
    target = node.target(admin.get(f"{PODS}/general")["metadata"]["uid"])
    kept = node.target(admin.get(f"{PODS}/own")["metadata"]["uid"])
    admin.delete(f"{PODS}/general", seconds=0)
    started = time.monotonic()
    eventually("the volume is taken away", lambda: str(target) not in node.mounted(), seconds=40)
    same("the volume of a pod that runs", str(kept) in node.mounted(), True)
    return f"unmounted {time.monotonic() - started:.1f} s after its pod was gone (grace 2 s); others stay"


def deletion_ends_a_publish(cluster):
    admin = cluster.plane.admin
    listener, endpoint = silent_origin()
    with listener, ClusterNode(cluster, "node-2", endpoint=endpoint) as node:
        made = admin.create(pod("waits", node="node-2", annotations={"weightd.io/model": MODEL}))
        call = node.plugin.NodePublishVolume.future(node.volume(made), timeout=120)
        time.sleep(1)
        same("the call waits", call.done(), False)
        admin.delete(f"{PODS}/waits")
        started = time.monotonic()
        error = call.exception(timeout=20)
        waited = time.monotonic() - started
        says("the call", error, grpc.StatusCode.ABORTED)
        same("mounts", node.mounted(), [])
    admin.delete(f"{PODS}/waits", seconds=0)
    return f"answered {waited * 1000:.0f} ms after the pod was deleted: {error.details().splitlines()[0]}"


def denied_is_told(cluster):
    """A plugin whose account has no rights says so, and how to mend it."""
    account = cluster.plane.account("default", NAMESPACE)
    with ClusterNode(cluster, "node-2", account=account) as node:
        made = cluster.plane.admin.create(pod("denied", node="node-2", annotations={"weightd.io/model": MODEL}))
        code = grpc.StatusCode.FAILED_PRECONDITION
        refused(node, made, code, "does not let the plugin get pod", "hint:")
    return "the pod is told which right is missing"


def run(cluster, check):
    cluster.install()
    cluster.plane.namespace("team-a")
    with ClusterNode(cluster, "node-1") as node:
        for test in [the_annotation_names_the_model, only_the_pod_itself_counts, a_pod_that_is_gone_loses_its_volume,
                     only_reads_are_asked_for]:
            check(test, cluster, node)
    check(deletion_ends_a_publish, cluster)
    check(denied_is_told, cluster)
