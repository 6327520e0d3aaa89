"""The chart: its values, what it renders, and the manifests made from it. Run by deploy/check/run."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
CHART = DEPLOY / "chart"
MANIFESTS = DEPLOY / "manifests"
# What the API server is, as far as the chart asks. Helm itself says v1.20 when it was built by `go install`.
KUBERNETES = "1.35.0"

failed = 0


def check(what, good, got=""):
    global failed
    if not good:
        failed += 1
        print(f"FAILED {what}: {got}", file=sys.stderr)


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def template(*arguments):
    helm = os.environ["HELM"]
    return run(helm, "template", "weightd", CHART, "--namespace", "weightd", "--kube-version", KUBERNETES, *arguments)


def objects(text):
    return [one for one in yaml.safe_load_all(text) if one]


def of_kind(rendered, kind):
    return [one for one in rendered if one["kind"] == kind]


def pods(rendered):
    """Each pod template with the name of what makes it."""
    for one in rendered:
        if one["kind"] in ("DaemonSet", "Deployment"):
            yield one["metadata"]["name"], one["spec"]["template"]
        if one["kind"] == "CronJob":
            yield one["metadata"]["name"], one["spec"]["jobTemplate"]["spec"]["template"]


def settings(name, rendered):
    """The daemon takes the settings that were made."""
    has = [one for one in of_kind(rendered, "ConfigMap") if "weightd.toml" in one["data"]]
    programs = sum(one["kind"] == "Deployment" for one in rendered) + 1
    check(f"{name}: a weightd.toml for daemon and controller", len(has) == programs, len(has))
    for one in has:
        toml = one["data"]["weightd.toml"]
        asked = check_config(toml)
        check(f"{name}: weightd --check-config", asked.returncode == 0, asked.stderr + toml)


def check_config(toml):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weightd.toml"
        # What the pod has as files.
        token = Path(directory) / "token"
        token.write_text("hf_x")
        path.write_text(toml.replace("/etc/weightd-hf/token", str(token)))
        return run(os.environ["WEIGHTD"], "--config", path, "--check-config")


def privileges(name, rendered):
    """Only what mounts is privileged, and it mounts only where it must."""
    for owner, pod in pods(rendered):
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            title = f"{name}: {owner}/{container['name']}"
            mounts = {mount["name"]: mount for mount in container.get("volumeMounts", [])}
            shared = [m["name"] for m in mounts.values() if m.get("mountPropagation") == "Bidirectional"]
            check(f"{title} has a read-only root", context.get("readOnlyRootFilesystem"), context)
            # Large numbers of a values file are easily written as 1e+09, which no API server takes.
            check(f"{title} has a user", isinstance(context.get("runAsUser"), int), context)
            if container["name"] in ("plugin", "expose"):
                check(f"{title} is privileged", context.get("privileged"), context)
                check(f"{title} propagates one volume", shared in (["pods"], ["shared"]), shared)
                continue
            check(f"{title} is not privileged", not context.get("privileged"), context)
            check(f"{title} gains nothing", context.get("allowPrivilegeEscalation") is False, context)
            check(f"{title} has no capabilities", context.get("capabilities") == {"drop": ["ALL"]}, context)
            check(f"{title} has seccomp", context.get("seccompProfile") == {"type": "RuntimeDefault"}, context)
            check(f"{title} propagates nothing", not shared, shared)
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        used = {m["name"] for c in pod["spec"]["containers"] for m in c.get("volumeMounts", [])}
        check(f"{name}: {owner} uses its volumes", used == volumes, used ^ volumes)


def constraints(name, rendered):
    """On OpenShift each pod's service account may use a Security Context Constraint that admits the pod, and none that admits more."""
    bindings = [one for one in of_kind(rendered, "RoleBinding") if "openshift" in one["roleRef"]["name"]]
    if not bindings:
        return
    granted = {one["subjects"][0]["name"]: one["roleRef"]["name"].rpartition(":")[2] for one in bindings}
    accounts = {one["metadata"]["name"] for one in of_kind(rendered, "ServiceAccount")}
    needed = {}
    for owner, pod in pods(rendered):
        spec = pod["spec"]
        account = spec.get("serviceAccountName", "default")
        contexts = [one["securityContext"] for one in spec["containers"]]
        # What nonroot-v2 refuses: https://docs.openshift.com, "Managing security context constraints".
        much = any("hostPath" in volume for volume in spec.get("volumes", []))
        much |= any(one.get("privileged") or not one.get("runAsUser") or "seLinuxOptions" in one for one in contexts)
        check(f"{name}: {owner} has an account of its own", account in accounts, account)
        needed[account] = "privileged" if much or needed.get(account) == "privileged" else "nonroot-v2"
    check(f"{name}: Security Context Constraints", granted == needed, (granted, needed))


def rights(name, rendered):
    """No role reads Secrets, but the controller its own certificate, by name."""
    for role in of_kind(rendered, "ClusterRole") + of_kind(rendered, "Role"):
        for rule in role["rules"]:
            check(f"{name}: {role['metadata']['name']} has no wildcard", "*" not in str(rule), rule)
            if "secrets" in rule["resources"]:
                own = rule.get("resourceNames") == ["weightd-webhook-certificate"]
                check(f"{name}: {role['metadata']['name']} reads one Secret", own and role["kind"] == "Role", rule)


def selectors(name, rendered):
    for one in rendered:
        if one["kind"] in ("DaemonSet", "Deployment"):
            wanted = one["spec"]["selector"]["matchLabels"].items()
            labels = one["spec"]["template"]["metadata"]["labels"].items()
            check(f"{name}: {one['metadata']['name']} selects its pods", wanted <= labels, labels)
    for service in of_kind(rendered, "Service"):
        wanted = service["spec"]["selector"].items()
        ports = {p["targetPort"] for p in service["spec"]["ports"]}
        chosen = [p for _, p in pods(rendered) if wanted <= p["metadata"]["labels"].items()]
        has = {p["name"] for pod in chosen for c in pod["spec"]["containers"] for p in c.get("ports", [])}
        check(f"{name}: Service {service['metadata']['name']} finds its ports", ports <= has, (ports, has))


def conventions(rendered):
    """KUBERNETES conventions for CSI drivers on a node."""
    (driver,) = of_kind(rendered, "CSIDriver")
    expected = {
        "attachRequired": False,
        "podInfoOnMount": True,
        "volumeLifecycleModes": ["Ephemeral", "Persistent"],
        "fsGroupPolicy": "None",
        "requiresRepublish": False,
        "seLinuxMount": False,
        "storageCapacity": False,
    }
    check("CSIDriver", driver["metadata"]["name"] == "csi.weightd.io" and driver["spec"] == expected, driver)
    (node,) = of_kind(rendered, "DaemonSet")
    spec = node["spec"]["template"]["spec"]
    check("priority", spec["priorityClassName"] == "system-node-critical", spec)
    check("tolerations", spec["tolerations"] == [{"operator": "Exists"}], spec["tolerations"])
    check("maxUnavailable", node["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == "10%", node)
    containers = {container["name"]: container for container in spec["containers"]}
    names = ["daemon", "plugin", "node-driver-registrar", "livenessprobe"]
    check("containers", list(containers) == names, list(containers))
    for name in ("daemon", "plugin"):
        check(f"{name} has a startup probe", "startupProbe" in containers[name])
    for name, container in containers.items():
        asked = container["resources"]
        check(f"{name} is not limited", set(asked) == {"requests"}, asked)
        check(f"{name} asks for little", int(asked["requests"]["cpu"].removesuffix("m")) <= 50, asked)


def written():
    """The values that documents and examples show."""
    for path in [DEPLOY / "README.md", DEPLOY / "shared-tier.md"]:
        for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)):
            yield f"{path.name}, block {number + 1}", block
    for path in sorted((DEPLOY / "examples").rglob("values.yaml")):
        yield str(path.relative_to(DEPLOY)), path.read_text()


def values(directory):
    """Sets of values that are good, and what each renders."""
    yield "defaults", []
    for path in sorted((CHART / "ci").glob("*.yaml")):
        yield path.stem, ["--values", path]
    for name, text in written():
        path = directory / (re.sub("[^a-z0-9]", "-", name.lower()) + ".yaml")
        path.write_text(text)
        yield name, ["--values", path]


def good_values(directory):
    for name, arguments in values(directory):
        linted = run(os.environ["HELM"], "lint", "--strict", "--kube-version", KUBERNETES, CHART, *arguments)
        check(f"{name}: helm lint", linted.returncode == 0, linted.stdout + linted.stderr)
        made = template(*arguments)
        check(f"{name}: helm template", made.returncode == 0, made.stderr)
        schemas = os.environ["SCHEMAS"] + "/{{ .ResourceKind }}{{ .KindSuffix }}.json"
        valid = run(os.environ["KUBECONFORM"], "-strict", "-summary", "-schema-location", schemas, input=made.stdout)
        check(f"{name}: kubeconform", valid.returncode == 0, valid.stdout + valid.stderr)
        rendered = objects(made.stdout)
        for look in (settings, privileges, constraints, rights, selectors):
            look(name, rendered)
        if name == "defaults":
            conventions(rendered)


def tokens():
    """The controller, which others reach over the network, has the Hub token only where it may use it."""
    plain = "controller.enabled=true,hf.tokenSecret.name=hub"
    for value, expected in ((plain, {"weightd-node"}),
                            (f"{plain},config.controller.own_credentials=true", {"weightd-node", "weightd-controller"})):
        rendered = objects(template("--set", value).stdout)
        has = {owner for owner, pod in pods(rendered) if any(v["name"] == "hf-token" for v in pod["spec"]["volumes"])}
        check(f"--set {value}: pods with the token", has == expected, has)
        maps = (one for one in of_kind(rendered, "ConfigMap") if "token_file" in one["data"].get("weightd.toml", ""))
        told = {one["metadata"]["name"].replace("config", "node") for one in maps}
        check(f"--set {value}: settings with the token", told == expected, told)


def bad_values():
    """Values that are refused, with a word of what is said."""
    refused = {
        "nodee.x=1": "nodee",
        "node.daemon.resource.x=1": "resource",
        "injection.mode=always": "mode",
        "injection.mode=webhook": "controller.enabled",
        "store.hostPath=relative": "hostPath",
        "config.root=/x": "store.hostPath",
        "config.hf.token_file=/x": "hf.tokenSecret",
        "config.metrics.listen=x": "metrics",
        "config.shared.root=/x": "shared",
        "config.controller.webhook=x": "injection",
        "shared.claim=x": "shared.enabled",
        "controller.scratch.emptyDir.medium=x,controller.scratch.hostPath.path=/x": "scratch",
        "shared.path=a/../../b": "path",
        # Kubernetes' way to write it is not weightctl's.
        "shared.gc.maxBytes=2Ti": "maxBytes",
        "image.digest=latest": "digest",
        "metrics.port=99999": "port",
        "metrics.port=9808": "node.livenessProbe.port",
        "metrics.port=8443,controller.enabled=true,injection.mode=webhook": "injection.webhook.port",
        # Kubelet's probes come from outside the pod.
        "metrics.address=127.0.0.1": "address",
    }
    for value, word in refused.items():
        made = template("--set", value)
        check(f"--set {value} is refused", made.returncode != 0 and word in made.stderr, made.stderr)
    for value in ("config.store.max_byte=1", "config.stor.max_bytes=1", "config.fetch.connections=0"):
        (toml,) = (c["data"]["weightd.toml"] for c in of_kind(objects(template("--set", value).stdout), "ConfigMap"))
        asked = check_config(toml)
        key = value.split("=", maxsplit=1)[0].removeprefix("config.")
        named = any(part in asked.stderr for part in key.split("."))
        check(f"the daemon refuses {value}", asked.returncode == 2 and named, asked.stderr)


HELM_ONLY = re.compile(r"^ *(helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: Helm)\n", re.MULTILINE)
SOURCE = re.compile(r"^# Source: .*\n", re.MULTILINE)
NAMESPACE = """\
---
apiVersion: v1
kind: Namespace
metadata:
  name: weightd
  labels:
    # The plugin is privileged, the daemon has directories of the node.
    pod-security.kubernetes.io/enforce: privileged
"""


def documents(*arguments):
    """What the chart renders, for those without Helm, by kind and name."""
    text = SOURCE.sub("", HELM_ONLY.sub("", template(*arguments).stdout))
    parts = [part.strip("\n") for part in re.split(r"^---\n", text, flags=re.MULTILINE)]
    made = {}
    for part in parts:
        one = yaml.safe_load(part) if part else None
        if one:
            made[one["kind"], one["metadata"]["name"]] = "---\n" + part + "\n"
    return made


def manifests():
    head = "# Made from deploy/chart by `UPDATE=1 deploy/check/run`. Do not edit.\n"
    crds = "".join("---\n" + path.read_text() for path in sorted((CHART / "crds").glob("*.yaml")))
    plain = documents()
    more = documents("--set", "controller.enabled=true,injection.mode=webhook")
    added = {key: text for key, text in more.items() if key not in plain}
    made = {
        "weightd.yaml": head + NAMESPACE + crds + "".join(plain.values()),
        # Beside weightd.yaml: controller and injection.
        "controller.yaml": head + "".join(added.values()),
    }
    changed = [key for key, text in plain.items() if more[key] != text]
    check("controller.yaml only adds to weightd.yaml", not changed, changed)
    for name, text in made.items():
        path = MANIFESTS / name
        if os.environ.get("UPDATE"):
            path.write_text(text)
        there = path.read_text() if path.exists() else ""
        check(f"deploy/manifests/{name} is up to date", there == text, "run UPDATE=1 deploy/check/run")


with tempfile.TemporaryDirectory() as work:
    good_values(Path(work))
bad_values()
tokens()
manifests()
if failed:
    sys.exit(f"check: {failed} failed")
print("check: the chart is good")
