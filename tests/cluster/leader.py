"""What the controller's leader makes of claims, rules, nodes that are gone, and 5,000 pods at once."""

import json
import time

from chart import PREFETCHES, prefetch
from control_plane import Processes, eventually, same
from machine import toml
from weightd import MODEL, NAMESPACE, REPO, resident_bytes

PODS = "/api/v1/namespaces/team-a/pods"
PODS_AT_ONCE = 5000
MEMORY_MIB = 64


class Leader(Processes):
    """One replica of the controller, with a shared tier and a Hub of its own."""

    def __init__(self, cluster):
        super().__init__(cluster.directory("leader"))
        self.cluster, self.admin = cluster, cluster.plane.admin

    def __enter__(self):
        self.cluster.install("--set", "controller.enabled=true")
        origin, binaries = self.work / "origin", self.cluster.binaries
        generate = [binaries / "weightd-standin", "generate", "--root", origin, "--shards", 2]
        self.start("generate", *generate, "--bytes-per-shard", 1_000_000).wait(timeout=60)
        hub = self.start("hub", binaries / "weightd-standin", "hub", f"--repo={REPO}={origin}",
                         stdin=-1, stdout=-1, text=True)
        kubeconfig = self.cluster.plane.account("weightd-controller").kubeconfig(self.work / "kubeconfig")
        config = {
            "root": str(self.work / "root"),
            "shared": {"root": str(self.work / "shared")},
            "hf": {"endpoint": json.loads(hub.stdout.readline())["endpoint"]},
            "kubernetes": {"kubeconfig": str(kubeconfig)},
        }
        rule = '[[access.deny]]\nsource = "hf://org/secret"\nnamespace = "team-a"\n'
        (self.work / "weightd.toml").write_text(f"{toml(config)}\n{rule}")
        command = [binaries / "weightd", "controller", "--config", self.work / "weightd.toml"]
        own = {"POD_NAMESPACE": NAMESPACE, "POD_NAME": "weightd-controller-c", "HOME": str(self.work)}
        self.program = self.start("controller", *command, env=own)
        return self


def waiting(name, **annotations):
    """A pod that no node has room for."""
    keys = {f"weightd.io/{key}": value for key, value in annotations.items()}
    spec = {"containers": [{"name": "main", "image": "example.invalid/server:1"}], "automountServiceAccountToken": False}
    about = {"name": name, "namespace": "team-a", "annotations": keys}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}


def told(leader, made, reason):
    query = {"fieldSelector": f"involvedObject.uid={made['metadata']['uid']},reason={reason}"}
    found = leader.admin.get("/api/v1/namespaces/team-a/events", **query)["items"]
    return [event["message"] for event in found if event["reportingComponent"] == "weightd.io/controller"]


def a_claim_of_a_volume_of_ours_counts(leader):
    volume = {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "pending"},
        "spec": {"accessModes": ["ReadOnlyMany"], "capacity": {"storage": "1Gi"}, "storageClassName": "",
                 "claimRef": {"namespace": "team-a", "name": "pending"},
                 "csi": {"driver": "csi.weightd.io", "volumeHandle": "pending",
                         "volumeAttributes": {"source": "hf://org/none"}}},
    }
    leader.admin.create(volume)
    thing = waiting("claims")
    claim = {"claimName": "pending"}
    thing["spec"]["volumes"] = [{"name": "model", "persistentVolumeClaim": claim}]
    made = leader.admin.create(thing)
    [text] = eventually("the pod is told", lambda: told(leader, made, "WeightsNotPrefetched"), seconds=60)
    leader.admin.delete(f"{PODS}/claims", seconds=0)
    leader.admin.delete("/api/v1/persistentvolumes/pending")
    return text


def a_pod_that_may_not_have_it_is_told(leader):
    made = leader.admin.create(waiting("denied", model="hf://org/secret"))
    [text] = eventually("the pod is told", lambda: told(leader, made, "WeightsNotPrefetched"), seconds=60)
    same("why", "may not use hf://org/secret" in text, True)
    leader.admin.delete(f"{PODS}/denied", seconds=0)
    return text


def nodes_that_are_gone_are_forgotten(leader):
    admin = leader.admin
    admin.create(prefetch("summed", source=MODEL))
    admin.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "summed-1"}})
    for name, phase in [("summed-1", "Ready"), ("summed-gone", "Fetching")]:
        entry = {"name": name, "phase": phase, "updated": "2026-01-01T00:00:00Z"}
        thing = {"apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch", "metadata": {"name": "summed"},
                 "status": {"nodes": [entry]}}
        admin.call("PATCH", f"{PREFETCHES}/summed/status", thing, "application/apply-patch+yaml",
                   fieldManager=f"weightd/{name}", force="true")

    def status():
        return admin.get(f"{PREFETCHES}/summed").get("status", {})

    eventually("the summary", lambda: status().get("summary") == "1/2 ready", seconds=30)
    eventually("the entry of a node that is not there goes", lambda: len(status()["nodes"]) == 1, seconds=120, pause=1)
    eventually("the summary", lambda: status().get("summary") == "1/1 ready", seconds=30)
    admin.delete(f"{PREFETCHES}/summed")
    admin.delete("/api/v1/nodes/summed-1")
    return "1/2 ready, and 1/1 once the entry of a node that is gone was removed"


def many_pods_cost_little(leader):
    before = resident_bytes(leader.program)
    for index in range(PODS_AT_ONCE):
        leader.admin.create(waiting(f"many-{index}", model=MODEL))
    time.sleep(3)
    grown = (resident_bytes(leader.program) - before) / 2**20
    events = leader.admin.get("/api/v1/namespaces/team-a/events")["items"]
    many = [event for event in events if event["involvedObject"]["name"].startswith("many-")]
    same(f"Events, at most 20: {len(many)}", len(many) <= 20, True)
    same(f"memory grown by at most {MEMORY_MIB} MiB: {grown:.1f}", grown <= MEMORY_MIB, True)
    leader.admin.delete(PODS, seconds=0)
    return f"{PODS_AT_ONCE} pods without a node: {grown:.1f} MiB more, {len(many)} Events"


def run(cluster, check):
    cluster.plane.namespace("team-a")
    with Leader(cluster) as leader:
        for test in [a_claim_of_a_volume_of_ours_counts, a_pod_that_may_not_have_it_is_told,
                     nodes_that_are_gone_are_forgotten, many_pods_cost_little]:
            check(test, leader)
    cluster.install()
