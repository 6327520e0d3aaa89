"""deploy/examples: schemas and conventions. Run by check/run."""

import re

import yaml

import common
from common import DEPLOY, EXAMPLES, check, conform, objects, text_of

REVISION = "0123456789abcdef0123456789abcdef01234567"
# Kinds that nobody publishes a schema of in a form we could take.
SKIPPED = ("eks.amazonaws.com/v1/NodeClass", "eksctl.io/v1alpha5/ClusterConfig")
ATTRIBUTES = {"source", "revision", "include", "exclude", "layout", "mode"}
TOKENS = re.compile(r"(HF_TOKEN|HUGGING_?FACE_?HUB_TOKEN)")


def manifests():
    """Each file with its text as an operator applies it; values of the chart are none."""
    for path in sorted(EXAMPLES.rglob("*.yaml")):
        if path.name != "values.yaml":
            names = ["REVISION", "SCOUT_REVISION", "MAVERICK_REVISION"]
            values = {name: REVISION for name in names} | {"VLLM_IMAGE": "vllm:1"}
            yield path.relative_to(EXAMPLES), path.read_text(), text_of(path, **values)


def pods(one):
    """Every pod template below an object."""
    if isinstance(one, dict):
        spec = one.get("spec")
        if isinstance(spec, dict) and "containers" in spec:
            yield one
        for value in one.values():
            yield from pods(value)
    elif isinstance(one, list):
        for value in one:
            yield from pods(value)


def volume(name, pod):
    """Its model volume: ours, read-only, at a fixed revision."""
    ours = [one["csi"] for one in pod["spec"]["volumes"] if one.get("csi")]
    check(f"{name}: one volume of weightd", [one["driver"] for one in ours] == ["csi.weightd.io"], ours)
    check(f"{name}: it is read-only", ours[0].get("readOnly") is True, ours)
    attributes = ours[0].get("volumeAttributes", {})
    check(f"{name}: known attributes", set(attributes) <= ATTRIBUTES, attributes)
    model = pod.get("metadata", {}).get("annotations", {}).get("weightd.io/model")
    asked = model or attributes.get("source", "") + "@" + attributes.get("revision", "")
    check(f"{name}: a revision that does not move", asked.endswith("@" + REVISION) and asked.startswith("hf://"), asked)
    gated = "meta-llama/" in asked
    check(f"{name}: a Secret for gated models only", ("nodePublishSecretRef" in ours[0]) == gated, ours)
    return attributes


def container(name, one, attributes):
    context = one.get("securityContext", {})
    check(f"{name}: not privileged", not context.get("privileged") and context.get("allowPrivilegeEscalation") is False, context)
    check(f"{name}: capabilities", context.get("capabilities", {}).get("drop") == ["ALL"], context)
    added = context["capabilities"].get("add", [])
    check(f"{name}: no capability but EFA's", added == (["IPC_LOCK"] if "efa" in str(one["resources"]) else []), added)
    environment = {entry["name"]: entry.get("value") for entry in one.get("env", [])}
    check(f"{name}: offline", environment.get("HF_HUB_OFFLINE") == "1", environment)
    check(f"{name}: no token", not any(TOKENS.search(key) for key in environment), environment)
    (mount,) = [entry for entry in one["volumeMounts"] if entry["name"] == "model"]
    if attributes.get("layout") == "hf-cache":
        check(f"{name}: the cache is the volume", environment.get("HF_HUB_CACHE") == mount["mountPath"], environment)
    script = " ".join(one.get("args", []))
    waits = "/.weightd/complete" in script or "weightctl wait" in script
    check(f"{name}: waits only where it must", waits == (attributes.get("mode") == "async"), script)
    if "readinessProbe" in one:
        check(f"{name}: a startup probe, no fixed delay", "startupProbe" in one and "initialDelaySeconds" not in one["readinessProbe"])


def workloads():
    seen = {}
    for path, source, text in manifests():
        check(f"{path}: nothing is left to put in", "${" not in text, re.findall(r"\$\{.*?\}", text))
        conform(str(path), text, *SKIPPED)
        for one in objects(text):
            for pod in pods(one):
                name = f"{path}: {one['kind']}"
                attributes = volume(name, pod)
                seen.setdefault((str(path), one["kind"]), []).append(attributes)
                for each in pod["spec"]["containers"]:
                    container(f"{name}/{each['name']}", each, attributes)
        if any(kind in source for kind in ("kind: Deployment", "kind: RayService", "kind: LeaderWorkerSet")):
            check(f"{path}: what it replaces and saves", "# Replaces: " in source and "# Saves" in source)
    return seen


def main():
    seen = workloads()
    kinds = sorted(kind for _, kind in seen)
    check("the deployments", kinds == ["Deployment", "Deployment", "Deployment", "LeaderWorkerSet", "RayService"], kinds)
    (group,) = [found for (_, kind), found in seen.items() if kind == "LeaderWorkerSet"]
    check("leader and worker have the same volume", len(group) == 2 and group[0] == group[1], group)
    # Values that the chart knows, if it is there.
    chart = DEPLOY / "chart" / "values.yaml"
    if chart.exists():
        known = yaml.safe_load(chart.read_text())
        values = yaml.safe_load((EXAMPLES / "deepseek-r1-qwen-32b-lws" / "values.yaml").read_text())
        for section, keys in values.items():
            if section != "config":
                check(f"values.yaml: {section}", set(keys) <= set(known.get(section, {})), keys)
    common.finish("deploy/examples")


if __name__ == "__main__":
    main()
