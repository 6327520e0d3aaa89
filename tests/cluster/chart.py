"""What the chart renders is taken by a real API server, and the custom resource keeps its promises there."""

import copy
from pathlib import Path

import yaml
from api import plural, refused
from control_plane import same
from weightd import NAMESPACE

# Kinds of others, which a cluster has only if their makers are installed.
FOREIGN = {"monitoring.coreos.com", "cert-manager.io"}
PREFETCHES = "/apis/weightd.io/v1alpha1/modelprefetches"


def prefetch(name, **spec):
    spec = {"source": "hf://org/model", **spec}
    return {"apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch", "metadata": {"name": name}, "spec": spec}


def try_all(cluster, things, what):
    """Applies objects without keeping them. A field that the server does not know is an error."""
    tried = 0
    for thing in things:
        if thing["apiVersion"].split("/")[0] in FOREIGN:
            continue
        thing = copy.deepcopy(thing)
        thing["metadata"].setdefault("namespace", NAMESPACE)
        try:
            cluster.plane.admin.apply(thing, dryRun="All")
        except Exception as error:
            kind = plural(thing["kind"])
            raise AssertionError(f"{what}: {kind} {thing['metadata']['name']} is not taken: {error}") from error
        tried += 1
    return tried


def every_rendering_is_taken(cluster):
    """With each set of values that the chart is checked with."""
    cluster.plane.namespace("monitoring")
    counts = []
    for values in sorted((cluster.chart / "ci").glob("*.yaml")):
        tried = try_all(cluster, cluster.render("--values", values), values.name)
        counts.append(f"{tried} with {values.stem}")
    return f"objects taken by the API server, strictly: {', '.join(counts)}"


def the_manifests_are_taken(cluster):
    """What is rendered for those without Helm."""
    tried = 0
    for file in sorted((cluster.chart.parent / "manifests").glob("*.yaml")):
        if file.name == "kustomization.yaml":
            continue
        things = [thing for thing in yaml.safe_load_all(Path(file).read_text()) if thing]
        tried += try_all(cluster, things, file.name)
    return f"{tried} objects"


def the_schema_refuses_nonsense(cluster):
    admin = cluster.plane.admin
    for what, spec in {
        "no source": {"source": None},
        "a path as a source": {"source": "/models"},
        "a source with a space": {"source": "hf://org/a model"},
        "a revision that is given twice": {"source": "hf://org/model@v1", "revision": "v2"},
        "a branch of a bucket": {"source": "s3://bucket/prefix", "revision": "main"},
        "a selector with a wrong operator": {
            "nodeSelector": {"matchExpressions": [{"key": "a", "operator": "Near", "values": ["b"]}]}
        },
        "a selector without its values": {"nodeSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
        "a priority that is no number": {"priority": "high"},
        "an unknown field": {"pinned": True},
    }.items():
        with refused(what, 400, 422):
            admin.create(prefetch("nonsense", **spec))
    return "9 kinds of it"


def the_custom_resource_has_defaults_and_columns(cluster):
    admin = cluster.plane.admin
    made = admin.create(prefetch("plain"))
    same("pin", made["spec"]["pin"], True)
    same("priority", made["spec"]["priority"], 0)
    table = admin.call("GET", PREFETCHES, accept="application/json;as=Table;v=v1;g=meta.k8s.io")
    columns = [column["name"] for column in table["columnDefinitions"]]
    same("columns", columns, ["Name", "Source", "Revision", "Priority", "Pin", "Summary", "Age"])
    short = {name for each in admin.get("/apis/weightd.io/v1alpha1")["resources"] for name in each.get("shortNames", [])}
    same("short names", short, {"mpf"})
    return f"`kubectl get mpf` shows {', '.join(columns)}"


def each_node_owns_its_entry_of_the_status(cluster):
    """By server-side apply as `weightd-node`: one node's entry never takes another's away."""
    account = cluster.plane.account("weightd-node")

    def report(node, phase):
        status = {"nodes": [{"name": node, "phase": phase, "updated": "2026-01-01T00:00:00Z"}]}
        thing = {**prefetch("plain"), "status": status}
        del thing["spec"]
        return account.apply(thing, manager=f"weightd/{node}", part="/status")

    report("node-1", "Fetching")
    report("node-2", "Pending")
    after = report("node-1", "Ready")
    phases = {each["name"]: each["phase"] for each in after["status"]["nodes"]}
    same("phases", phases, {"node-1": "Ready", "node-2": "Pending"})
    with refused("a phase that there is none of", 400, 422):
        report("node-1", "Dreaming")
    cluster.plane.admin.delete(f"{PREFETCHES}/plain")
    return "two nodes, each with its own"


def run(cluster, check):
    cluster.install()
    for test in [every_rendering_is_taken, the_manifests_are_taken, the_schema_refuses_nonsense,
                 the_custom_resource_has_defaults_and_columns, each_node_owns_its_entry_of_the_status]:
        check(test, cluster)
