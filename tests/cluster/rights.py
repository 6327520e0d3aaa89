"""The service accounts may do what they need, and nothing else."""

import uuid
from concurrent.futures import ThreadPoolExecutor

from api import Refused, refused
from chart import prefetch
from control_plane import eventually, same
from weightd import NAMESPACE, pod

READ = ["get", "list", "watch"]
FOLLOW = ["list", "watch"]
VERBS = [*READ, "create", "update", "patch", "delete", "deletecollection"]

# (group, resource, name, verbs); names are those that RBAC can ask for.
NODE = [
    ("", "pods", None, READ),
    ("", "nodes", None, [*READ, "patch"]),
    ("storage.k8s.io", "csinodes", None, READ),
    ("", "events", None, ["create", "patch"]),
    ("events.k8s.io", "events", None, ["create", "patch"]),
    ("weightd.io", "modelprefetches", None, READ),
    ("weightd.io", "modelprefetches/status", None, ["patch"]),
]
CONTROLLER = [
    ("", "pods", None, FOLLOW),
    ("", "nodes", None, FOLLOW),
    ("", "persistentvolumes", None, FOLLOW),
    ("events.k8s.io", "events", None, ["create", "patch"]),
    ("weightd.io", "modelprefetches", None, FOLLOW),
    ("weightd.io", "modelprefetches/status", None, ["patch"]),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", "weightd-injection", ["get", "patch"]),
]
# Only in the release's namespace.
CONTROLLER_AT_HOME = [
    ("coordination.k8s.io", "leases", None, ["create"]),
    ("coordination.k8s.io", "leases", "weightd-controller", ["get", "update"]),
    ("", "secrets", "weightd-webhook-certificate", ["get", "update"]),
]
# What Kubernetes lets everybody ask about themselves.
EVERYBODY = {
    ("authorization.k8s.io", "selfsubjectaccessreviews"),
    ("authorization.k8s.io", "selfsubjectrulesreviews"),
    ("authentication.k8s.io", "selfsubjectreviews"),
}
WITH_CONTROLLER = ["--set", "controller.enabled=true,injection.mode=webhook"]


def may(account, verb, group, resource, namespace, name):
    """What the API server says to `kubectl auth can-i`."""
    resource, _, part = resource.partition("/")
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": part, "namespace": namespace}
    asked |= {"name": name} if name else {}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
              "spec": {"resourceAttributes": asked}}
    return account.create(review)["status"]["allowed"]


def all_resources(admin):
    """Every (group, resource) that the API server has."""
    found = {("", each["name"]) for each in admin.get("/api/v1")["resources"]}
    for group in admin.get("/apis")["groups"]:
        for version in group["versions"]:
            resources = admin.get(f"/apis/{version['groupVersion']}")["resources"]
            found |= {(group["name"], each["name"]) for each in resources}
    return sorted(found)


def exactly_this_is_granted(cluster, account, granted, namespace):
    """Each verb on each resource that there is, with no name and with each name that a rule has."""
    names = [None, *{name for _, _, name, _ in granted if name}]
    expected = {(group, resource, name, verb) for group, resource, only, verbs in granted for verb in verbs
                for name in names if only in (None, name)}
    expected |= {(group, resource, name, "create") for group, resource in EVERYBODY for name in names}
    questions = [(group, resource, name, verb) for group, resource in all_resources(cluster.plane.admin)
                 for name in names for verb in VERBS]

    def answer(question):
        group, resource, name, verb = question
        return question if may(account, verb, group, resource, namespace, name) else None

    with ThreadPoolExecutor(16) as workers:
        allowed = {question for question in workers.map(answer, questions) if question}
    same("granted beyond what is needed", sorted(map(str, allowed - expected)), [])
    same("needed and not granted", sorted(map(str, expected - allowed)), [])
    return f"{len(allowed)} of {len(questions)} in {namespace}"


def the_node_may_do_this_only(cluster):
    account = cluster.plane.account("weightd-node")
    elsewhere = exactly_this_is_granted(cluster, account, NODE, "team-a")
    return f"{elsewhere}; {exactly_this_is_granted(cluster, account, NODE, NAMESPACE)}"


def the_controller_may_do_this_only(cluster):
    account = cluster.plane.account("weightd-controller")
    elsewhere = exactly_this_is_granted(cluster, account, CONTROLLER, "team-a")
    at_home = exactly_this_is_granted(cluster, account, CONTROLLER + CONTROLLER_AT_HOME, NAMESPACE)
    return f"{elsewhere}; {at_home}"


def event(name, group):
    about = {"kind": "Pod", "namespace": "team-a", "name": "seen"}
    made = {"kind": "Event", "metadata": {"name": name, "namespace": "team-a"}, "reason": "WeightsFetching",
            "type": "Normal"}
    if not group:
        return {**made, "apiVersion": "v1", "involvedObject": about}
    own = {"regarding": about, "action": "Fetch", "eventTime": "2026-01-01T00:00:00.000000Z",
           "reportingController": "csi.weightd.io", "reportingInstance": "node-1"}
    return {**made, **own, "apiVersion": "events.k8s.io/v1"}


def read(account, collection, name):
    """get, if a name is said, list and watch. Gives how many verbs that were."""
    if name:
        account.get(f"{collection}/{name}")
    account.get(collection, limit=1)
    account.get(collection, watch="true", timeoutSeconds=1)
    return 3 if name else 2


def use_the_rights_of_both(account, names, events):
    # A watch takes a second: all at once.
    with ThreadPoolExecutor() as workers:
        used = sum(workers.map(lambda item: read(account, *item), names.items()))
    for group in events:
        path = f"/apis/{group}/v1" if group else "/api/v1"
        name = f"seen-{uuid.uuid4()}"
        account.create(event(name, group))
        series = {"series": {"count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z"}}
        account.merge(f"{path}/namespaces/team-a/events/{name}", series)
        used += 2
    status = {**prefetch("seen"), "status": {"summary": "0/1 ready"}}
    del status["spec"]
    account.apply(status, part="/status")
    return used + 1


def prepare(cluster):
    admin = cluster.plane.admin
    cluster.plane.namespace("team-a")
    admin.apply(pod("seen"))
    admin.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}})
    node = {"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": "node-1"}, "spec": {"drivers": []}}
    if not admin.exists("/apis/storage.k8s.io/v1/csinodes/node-1"):
        admin.create(node)
    admin.apply(prefetch("seen"))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hf", "namespace": "team-a"}}
    admin.apply({**secret, "stringData": {"hf-token": "hf_secret"}})


def clean_up(cluster):
    admin = cluster.plane.admin
    admin.delete("/api/v1/namespaces/team-a/pods/seen", seconds=0)
    admin.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/daemon", seconds=0)
    for path in ["/api/v1/nodes/node-1", "/api/v1/nodes/node-2", "/apis/storage.k8s.io/v1/csinodes/node-1",
                 "/apis/weightd.io/v1alpha1/modelprefetches/seen", "/api/v1/namespaces/team-a/secrets/hf"]:
        admin.delete(path)


BOTH = {
    "/api/v1/namespaces/team-a/pods": "seen",
    "/api/v1/nodes": "node-1",
    "/apis/weightd.io/v1alpha1/modelprefetches": "seen",
}


def the_nodes_rights_work(cluster):
    """Each verb in a real request."""
    account = cluster.plane.account("weightd-node")
    names = {**BOTH, "/apis/storage.k8s.io/v1/csinodes": "node-1"}
    used = use_the_rights_of_both(account, names, ["", "events.k8s.io"])
    account.merge("/api/v1/nodes/node-1", {"metadata": {"labels": {"model.weightd.io/hf.org.model": "seen"}}})
    return f"{used + 1} requests"


def the_controllers_rights_work(cluster):
    account, admin = cluster.plane.account("weightd-controller"), cluster.plane.admin
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "seen"},
              "spec": {"accessModes": ["ReadOnlyMany"], "capacity": {"storage": "1Gi"},
                       "csi": {"driver": "csi.weightd.io", "volumeHandle": "hf://org/model"}}}
    admin.create(volume)
    names = dict.fromkeys([*BOTH, "/api/v1/persistentvolumes"])
    used = use_the_rights_of_both(account, names, ["events.k8s.io"])
    leases = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
    about = {"name": "weightd-controller", "namespace": NAMESPACE}
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": about}
    account.create(lease)
    found = account.get(f"{leases}/weightd-controller")
    account.call("PUT", f"{leases}/weightd-controller", found)
    path = f"/api/v1/namespaces/{NAMESPACE}/secrets/weightd-webhook-certificate"
    account.call("PUT", path, account.get(path))
    path = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/weightd-injection"
    account.get(path)
    account.merge(path, {"metadata": {"annotations": {"seen": "yes"}}})
    with refused("another lease", 403):
        account.get(f"{leases}/another")
    for path in [f"{leases}/weightd-controller", "/api/v1/persistentvolumes/seen"]:
        admin.delete(path)
    return f"{used + 7} requests"


def what_is_not_granted_is_denied(cluster):
    """In real requests, as both accounts."""
    denied = [
        ("GET", "/api/v1/namespaces/team-a/secrets/hf", None),
        ("GET", "/api/v1/namespaces/team-a/secrets", None),
        ("GET", "/api/v1/secrets", None),
        ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets", None),
        ("POST", "/api/v1/namespaces/team-a/pods", pod("evil")),
        ("DELETE", "/api/v1/namespaces/team-a/pods/seen", None),
        ("PATCH", "/api/v1/namespaces/team-a/pods/seen", {"metadata": {"labels": {"a": "b"}}}),
        ("POST", "/api/v1/namespaces/team-a/pods/seen/exec", None),
        ("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/weightd-node/token", {}),
        ("DELETE", "/api/v1/nodes/node-1", None),
        ("PATCH", "/api/v1/nodes/node-1/status", {"status": {}}),
        ("PATCH", "/apis/weightd.io/v1alpha1/modelprefetches/seen", {"spec": {"source": "hf://org/other"}}),
        ("DELETE", "/apis/weightd.io/v1alpha1/modelprefetches/seen", None),
        ("GET", "/api/v1/namespaces/kube-system/configmaps", None),
    ]
    for name in ["weightd-node", "weightd-controller"]:
        account = cluster.plane.account(name)
        for method, path, body in denied:
            kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
            with refused(f"{method} {path} as {name}", 403):
                account.call(method, path, body, kind)
    with refused("a Secret of another name", 403):
        cluster.plane.account("weightd-controller").get(f"/api/v1/namespaces/{NAMESPACE}/secrets/hub")
    with refused("a patch of a node by the controller", 403):
        cluster.plane.account("weightd-controller").merge("/api/v1/nodes/node-1", {"metadata": {"labels": {"a": "b"}}})
    return f"{2 * len(denied) + 2} requests, among them all for Secrets of others"


def tainted(*keys):
    return {"spec": {"taints": [{"key": key, "effect": "NoExecute"} for key in keys]}}


def a_daemon_changes_its_own_node_only(cluster):
    """With a token as kubelet gets it for the daemon's pod: it names the pod's node."""
    admin, path = cluster.plane.admin, "/api/v1/nodes/{}".format
    startup, warming = "csi.weightd.io/agent-not-ready", "weightd.io/warming"
    admin.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-2", "labels": {"a": "b"}}})
    admin.merge(path("node-1"), {**tainted(startup, warming, "other"), "metadata": {"labels": {"a": "b"}}})
    admin.apply(pod("daemon", NAMESPACE, "node-1", serviceAccountName="weightd-node"))
    account = cluster.plane.account("weightd-node", pod="daemon")
    mine = {"metadata": {"labels": {"model.weightd.io/hf.org.model": "seen"}}}

    def is_in_force():
        try:
            account.merge(path("node-2"), mine)
        except Refused as error:
            return error.status == 403 and "no Node but its own" in str(error)
        return False

    eventually("the policy is in force", is_in_force, pause=0.5)
    denied = {
        "a label of another name": {"metadata": {"labels": {"c": "d"}}},
        "another value of a label": {"metadata": {"labels": {"a": "c"}}},
        "a label away": {"metadata": {"labels": {"a": None}}},
        "an annotation": {"metadata": {"annotations": {"a": "b"}}},
        "another's taint away": tainted(startup, warming),
        "a taint more": tainted(startup, warming, "other", "more"),
        "cordoned": {"spec": {"unschedulable": True}},
    }
    for what, change in denied.items():
        with refused(what, 403):
            account.merge(path("node-1"), change)
    account.merge(path("node-1"), mine)
    account.merge(path("node-1"), {"metadata": {"labels": {"model.weightd.io/hf.org.model": None}}})
    account.merge(path("node-1"), tainted(warming, "other"))
    account.merge(path("node-1"), tainted("other"))
    # Others are not kept from it.
    admin.merge(path("node-1"), {"spec": {"taints": None, "unschedulable": True}, "metadata": {"labels": {"a": None}}})
    return f"{len(denied)} other changes of its own Node denied, labels and taints of weightd changed"


def run(cluster, check):
    cluster.install(*WITH_CONTROLLER)
    prepare(cluster)
    try:
        for test in [the_node_may_do_this_only, the_controller_may_do_this_only, the_nodes_rights_work,
                     the_controllers_rights_work, what_is_not_granted_is_denied,
                     a_daemon_changes_its_own_node_only]:
            check(test, cluster)
    finally:
        try:
            clean_up(cluster)
        except Refused as error:
            print(f"not cleaned up: {error}")
