"""The chart's MutatingAdmissionPolicy, evaluated by a real API server, gives pods what the webhook gives them."""

from control_plane import eventually, same
from weightd import NAMESPACE

COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
PODS = "/api/v1/namespaces/policed/pods"


def pod(name, annotations, namespace="policed", containers=None, **spec):
    about = {"name": name, "namespace": namespace, "annotations": annotations}
    containers = containers or [{"name": "main", "image": "none"}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": {"containers": containers, **spec}}


def asked(name, **annotations):
    keys = {f"weightd.io/{key.replace('_', '-')}": value for key, value in annotations.items()}
    return pod(name, keys)


def ours(volumes):
    return [volume for volume in volumes if volume["name"] == "weightd-model"]


def mounts(container):
    return [(one["name"], one["mountPath"]) for one in container.get("volumeMounts", []) if "weightd" in one["name"]]


def preferred(made):
    affinity = made["spec"].get("affinity", {}).get("nodeAffinity", {})
    return affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])


def wait_for_the_policy(cluster):
    admin = cluster.plane.admin

    def injected():
        made = admin.call("POST", PODS, asked("probe", model="hf://org/model"), dryRun="All")
        return ours(made["spec"].get("volumes", []))

    eventually("the policy is in force", injected, seconds=60, pause=0.5)
    status = admin.get("/apis/admissionregistration.k8s.io/v1beta1/mutatingadmissionpolicies/weightd-injection")
    return status["metadata"]["name"]


def a_pod_with_the_annotation_gets_its_volume(cluster):
    made = cluster.plane.admin.create(asked("plain", model="hf://org/model"))
    (volume,) = ours(made["spec"]["volumes"])
    expected = {"driver": "csi.weightd.io", "readOnly": True, "volumeAttributes": {"source": "hf://org/model"}}
    same("volume", volume["csi"], expected)
    (container,) = made["spec"]["containers"]
    same("mounts", mounts(container), [("weightd-model", "/models")])
    same("env", container.get("env"), None)
    (term,) = preferred(made)
    key = {"key": "model.weightd.io/hf.org.model", "operator": "Exists"}
    same("term", term, {"weight": 100, "preference": {"matchExpressions": [key]}})
    return "volume, mount and preferred nodes"


def everything_that_annotations_may_say(cluster):
    model = f"hf://org/model@{COMMIT}"
    containers = [
        {"name": "main", "image": "none", "env": [{"name": "HF_HUB_OFFLINE", "value": "0"}]},
        {"name": "own", "image": "none", "volumeMounts": [{"name": "own", "mountPath": "/weights/x"}]},
        {"name": "far", "image": "none", "env": [{"name": "HF_HUB_CACHE", "value": "/far"}]},
    ]
    inits = [
        {"name": "init", "image": "none"},
        {"name": "sidecar", "image": "none", "restartPolicy": "Always"},
    ]
    term = {"weight": 1, "preference": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}}
    annotations = {
        "weightd.io/model": f" {model} ",
        "weightd.io/mount-path": "/weights/",
        "weightd.io/layout": "hf-cache",
        "weightd.io/secret": "hub",
    }
    thing = pod("full", annotations, containers=containers, initContainers=inits, affinity=affinity,
                volumes=[{"name": "own", "emptyDir": {}}])
    made = cluster.plane.admin.create(thing)
    (volume,) = ours(made["spec"]["volumes"])
    same("attributes", volume["csi"]["volumeAttributes"], {"source": model, "layout": "hf-cache"})
    same("secret", volume["csi"]["nodePublishSecretRef"], {"name": "hub"})
    main, own, far = made["spec"]["containers"]
    here = [("weightd-model", "/weights")]
    same("mounts", [mounts(one) for one in (main, own, far)], [here, [], here])
    env = [{one["name"]: one["value"] for one in container.get("env", [])} for container in (main, own, far)]
    expected = [{"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": "/weights"}, {}, {"HF_HUB_CACHE": "/far"}]
    same("env", env, expected)
    init, sidecar = made["spec"]["initContainers"]
    same("mounts of init containers", [mounts(init), mounts(sidecar)], [[], here])
    key = {"key": "model.weightd.io/hf.org.model", "operator": "In", "values": [COMMIT]}
    same("terms", preferred(made), [term, {"weight": 100, "preference": {"matchExpressions": [key]}}])
    return "layout, path, secret, pinned commit; what the author wrote stays"


def other_pods_are_left_alone(cluster):
    csi = {"driver": "csi.weightd.io", "readOnly": True}
    written = [{"name": "model", "csi": csi}]
    for name, thing in {
        "without": pod("without", {}),
        "empty": asked("empty", model=" "),
        "relative": asked("relative", model="hf://org/model", mount_path="models"),
        "above": asked("above", model="hf://org/model", mount_path="/a/../b"),
        "written": pod("written", {"weightd.io/model": "hf://org/model"}, volumes=written),
        "taken": pod("taken", {"weightd.io/model": "hf://org/model"},
                     volumes=[{"name": "weightd-model", "emptyDir": {}}]),
        "mirror": asked("mirror", model="hf://org/model") | {"mirror": True},
    }.items():
        if thing.pop("mirror", False):
            thing["metadata"]["annotations"]["kubernetes.io/config.mirror"] = "x"
            thing["spec"]["nodeName"] = "node-1"
        made = cluster.plane.admin.call("POST", PODS, thing, dryRun="All")
        before = [v["name"] for v in thing["spec"].get("volumes", [])]
        after = [v["name"] for v in made["spec"].get("volumes", []) if not v["name"].startswith("kube-api-access")]
        same(f"volumes of {name}", after, before)
        same(f"terms of {name}", preferred(made), [])
    for namespace in (NAMESPACE, "kube-system"):
        cluster.plane.namespace(namespace)
        thing = pod("ours", {"weightd.io/model": "hf://org/model"}, namespace=namespace)
        made = cluster.plane.admin.call("POST", f"/api/v1/namespaces/{namespace}/pods", thing, dryRun="All")
        same(f"volumes in {namespace}", ours(made["spec"].get("volumes", [])), [])
    return "those without the annotation, with a volume of their own, or of system namespaces"


def a_second_pass_changes_nothing(cluster):
    made = cluster.plane.admin.get(f"{PODS}/full")
    again = {"apiVersion": "v1", "kind": "Pod", "spec": made["spec"],
             "metadata": {"name": "again", "namespace": "policed", "annotations": made["metadata"]["annotations"]}}
    twice = cluster.plane.admin.call("POST", PODS, again, dryRun="All")
    for key in ("volumes", "containers", "initContainers", "affinity"):
        same(key, twice["spec"][key], made["spec"][key])
    return "a pod that has all it needs stays as it is"


def names_that_no_label_has(cluster):
    for model in ("s3://bucket/a b", "s3://bucket/model_", "s3://bucket/" + "x" * 60, "nonsense"):
        made = cluster.plane.admin.call("POST", PODS, asked("odd", model=model), dryRun="All")
        same(f"terms for {model}", preferred(made), [])
        same(f"volumes for {model}", len(ours(made["spec"]["volumes"])), 1)
    made = cluster.plane.admin.call("POST", PODS, asked("s3", model="s3://bucket/models/x"), dryRun="All")
    (term,) = preferred(made)
    same("key", term["preference"]["matchExpressions"][0]["key"], "model.weightd.io/s3.bucket.models.x")
    return "get the volume, and no preference"


def run(cluster, checks):
    cluster.plane.namespace("policed")
    cluster.install("--set", "injection.mode=policy")
    wait_for_the_policy(cluster)
    checks(a_pod_with_the_annotation_gets_its_volume, cluster)
    checks(everything_that_annotations_may_say, cluster)
    checks(other_pods_are_left_alone, cluster)
    checks(a_second_pass_changes_nothing, cluster)
    checks(names_that_no_label_has, cluster)
