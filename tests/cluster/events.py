"""What `kubectl describe pod` shows of a volume, as the API server keeps it."""

import time

import grpc
from control_plane import eventually, same
from weightd import MODEL, ClusterNode, pod, silent_origin

PODS = "/api/v1/namespaces/team-a/pods"


def events_of(cluster, made):
    """Of the plugin, by their reasons; as kubectl reads them."""
    query = {"fieldSelector": f"involvedObject.uid={made['metadata']['uid']}"}
    found = cluster.plane.admin.get("/api/v1/namespaces/team-a/events", **query)["items"]
    ours = [event for event in found if event["reportingComponent"] == "csi.weightd.io"]
    return {event["reason"]: event for event in ours}


def a_volume_that_waits_is_told_of(cluster):
    """At once that it is fetched, and later again, in the same Event."""
    admin = cluster.plane.admin
    listener, endpoint = silent_origin()
    with listener, ClusterNode(cluster, "node-2", endpoint=endpoint) as node:
        made = admin.create(pod("slow", node="node-2", annotations={"weightd.io/model": MODEL}))
        started = time.monotonic()
        call = node.plugin.NodePublishVolume.future(node.volume(made), timeout=120)
        first = eventually("an Event", lambda: events_of(cluster, made).get("WeightsFetching"), seconds=20)
        after = time.monotonic() - started
        same("type", first["type"], "Normal")
        same("who says so", first["reportingInstance"], "node-2")

        def again():
            event = events_of(cluster, made)["WeightsFetching"]
            return event if (event.get("series") or {}).get("count", 1) > 1 else None

        second = eventually("the Event is brought up to date", again, seconds=60)
        same("the name of the Event", second["metadata"]["name"], first["metadata"]["name"])
        same("reasons", set(events_of(cluster, made)), {"WeightsFetching"})
        admin.delete(f"{PODS}/slow", seconds=0)
        call.exception(timeout=20)
    return f"after {after:.1f} s: {first['message']}; after {time.monotonic() - started:.0f} s again"


def a_model_that_is_not_there_is_told_of(cluster, node):
    admin = cluster.plane.admin
    made = admin.create(pod("failed", annotations={"weightd.io/model": "hf://org/none"}))
    try:
        node.publish_to(made)
    except grpc.RpcError as error:
        same("code", error.code(), grpc.StatusCode.NOT_FOUND)
    event = eventually("an Event", lambda: events_of(cluster, made).get("WeightsFailed"), seconds=30)
    same("type", event["type"], "Warning")
    admin.delete(f"{PODS}/failed", seconds=0)
    return event["message"].splitlines()[0][:140]


def a_volume_that_is_there_at_once_has_no_events(cluster, node):
    """5,000 pods that start with a cached model cost the API server nothing."""
    admin = cluster.plane.admin
    made = admin.create(pod("fast", annotations={"weightd.io/model": MODEL}))
    node.publish_to(made)
    time.sleep(1)
    same("Events", events_of(cluster, made), {})
    admin.delete(f"{PODS}/fast", seconds=0)
    return "none"


def run(cluster, check):
    cluster.install()
    cluster.plane.namespace("team-a")
    check(a_volume_that_waits_is_told_of, cluster)
    with ClusterNode(cluster, "node-1") as node:
        check(a_model_that_is_not_there_is_told_of, cluster, node)
        check(a_volume_that_is_there_at_once_has_no_events, cluster, node)
