"""Two replicas of the controller: one leads, both answer the API server's questions about pods."""

import copy
import signal
import subprocess
import time
import tomllib

import yaml
from control_plane import ADDRESS, Processes, eventually, same
from weightd import NAMESPACE, toml

LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/weightd-controller"
WEBHOOK = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/weightd-injection"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPLICAS = ["a", "b"]
PREFERRED, LABELLED = "preferredDuringSchedulingIgnoredDuringExecution", {"key": "model.weightd.io/hf.org.model"}
WITH_WEBHOOK = ["--set", "controller.enabled=true,injection.mode=webhook"]
WITH_POLICY = ["--set", "injection.mode=policy"]


class Controller(Processes):
    """The replicas of the Deployment, each with an address of its own, as pods have."""

    def __init__(self, cluster, *options, **env):
        super().__init__(cluster.directory("controller"))
        self.cluster, self.admin, self.running = cluster, cluster.plane.admin, {}
        self.options, self.env = [*WITH_WEBHOOK, *options], env

    def __enter__(self):
        things = self.cluster.install(*self.options)
        self.deployment = next(thing for thing in things if thing["kind"] == "Deployment")
        volumes = {volume["name"]: volume for volume in self.deployment["spec"]["template"]["spec"]["volumes"]}
        about = ("ConfigMap", volumes["config"]["configMap"]["name"])
        config = next(thing for thing in things if (thing["kind"], thing["metadata"]["name"]) == about)
        self.config = tomllib.loads(config["data"]["weightd.toml"])
        self.service = next(thing for thing in things if thing["kind"] == "Service")
        [webhook] = next(thing for thing in things if thing["kind"] == "MutatingWebhookConfiguration")["webhooks"]
        same("whose service the webhook is", webhook["clientConfig"]["service"]["name"], self.service["metadata"]["name"])
        self.kubeconfig = self.cluster.plane.account("weightd-controller").kubeconfig(self.work / "kubeconfig")
        return self

    def address(self, name):
        return f"{ADDRESS[:-1]}{11 + REPLICAS.index(name)}"

    def start_replica(self, name):
        address = self.address(name)
        subprocess.run(["ip", "address", "replace", f"{address}/32", "dev", "lo"], check=True)
        config = copy.deepcopy(self.config)
        # The chart's own, but for where a process has something else than a pod.
        config |= {"root": str(self.work / name), "socket": str(self.work / f"{name}.sock")}
        config["metrics"]["listen"] = f"{address}:9809"
        config["kubernetes"] = {**config.get("kubernetes", {}), "kubeconfig": str(self.kubeconfig)}
        config["controller"] = {**config.get("controller", {}), "webhook": f"{address}:8443"}
        file = self.work / f"{name}.toml"
        file.write_text(toml(config))
        program = self.cluster.binaries / "weightd"
        own = {"POD_NAMESPACE": NAMESPACE, "POD_NAME": f"weightd-controller-{name}", "HOME": str(self.work)} | self.env
        self.running[name] = self.start(f"replica-{name}", program, "controller", "--config", file, env=own)

    def publish(self, *names):
        """Which replicas are behind the webhook's service: the controller of EndpointSlices says so by their probes."""
        about = {"name": "weightd-webhook", "namespace": NAMESPACE,
                 "labels": {"kubernetes.io/service-name": self.service["metadata"]["name"]}}
        endpoints = [{"addresses": [self.address(name)], "conditions": {"ready": True}} for name in names]
        ports = [{"name": "webhook", "port": 8443, "protocol": "TCP"}]
        self.admin.apply({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": about,
                          "addressType": "IPv4", "endpoints": endpoints, "ports": ports})

    def leader(self):
        """The replica that holds the Lease."""
        holder = self.admin.get(LEASE)["spec"].get("holderIdentity") or ""
        return next((name for name in REPLICAS if holder.startswith(f"weightd-controller-{name}")), None)

    def other(self, name):
        return next(each for each in REPLICAS if each != name)


def shaped(name, annotations, **spec):
    """A pod without a volume of ours."""
    content = {"containers": [{"name": "main", "image": "example.invalid/server:1"}], "automountServiceAccountToken": False}
    about = {"name": name, "namespace": "team-a", "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": content | spec}


def container(name, **more):
    return {"name": name, "image": "example.invalid/server:1", **more}


def questions():
    """Pods with the annotation, by what is special about them."""
    in_zone = {"key": "zone", "operator": "In", "values": ["a"]}
    affinity = {"nodeAffinity": {PREFERRED: [{"weight": 5, "preference": {"matchExpressions": [in_zone]}}]}}
    model = {"weightd.io/model": "hf://org/model"}
    cache = {**model, "weightd.io/layout": "hf-cache"}
    own = {"name": "mine", "csi": {"driver": "csi.weightd.io", "readOnly": True}}
    sidecar = container("sidecar", restartPolicy="Always")
    return {
        "plain": shaped("plain", model),
        "pinned": shaped("pinned", {"weightd.io/model": f"hf://org/model@{COMMIT}"}),
        "bucket": shaped("bucket", {"weightd.io/model": "s3://bucket/models/x"}),
        "elsewhere": shaped("elsewhere", {**model, "weightd.io/mount-path": "/weights"}),
        "cache": shaped("cache", cache, containers=[container("main"), container("other")]),
        "secret": shaped("secret", {**model, "weightd.io/secret": "hub"}),
        "sidecar": shaped("sidecar", model, initContainers=[container("prepare"), sidecar]),
        "affinity": shaped("affinity", model, affinity=affinity),
        "own cache": shaped("own-cache", cache, containers=[
            container("main", env=[{"name": "HF_HUB_CACHE", "value": "/elsewhere"}])]),
        "own volume": shaped("own-volume", model, volumes=[own], containers=[
            container("main", volumeMounts=[{"name": "mine", "mountPath": "/m", "readOnly": True}])]),
        "anti-affinity": shaped("anti-affinity", model, affinity={"podAntiAffinity": {}}),
        "no preference": shaped("no-preference", model, affinity={"nodeAffinity": {"requiredDuringScheduling"
                                "IgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [in_zone]}]}}}),
        "preferred already": shaped("preferred", model, affinity={"nodeAffinity": {PREFERRED: [
            {"weight": 1, "preference": {"matchExpressions": [{**LABELLED, "operator": "Exists"}]}}]}}),
        "block of YAML": shaped("block", {"weightd.io/model": " hf://org/model@v1\n"}),
        "slash": shaped("slash", {**model, "weightd.io/mount-path": "/weights/"}),
        "relative path": shaped("relative", {**model, "weightd.io/mount-path": "weights"}),
        "path upwards": shaped("upwards", {**model, "weightd.io/mount-path": "/a/../b"}),
        "no Secret's name": shaped("no-secret", {**model, "weightd.io/secret": "Not A Name"}),
        "a Secret's name with two dots": shaped("two-dots", {**model, "weightd.io/secret": "a..b"}),
        "for Windows": shaped("windows", model, os={"name": "windows"}),
        "selects Windows": shaped("selects-windows", model, nodeSelector={"kubernetes.io/os": "windows"}),
        "a device in the way": shaped("device", model, volumes=[
            {"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}], containers=[
            container("main", volumeDevices=[{"name": "disk", "devicePath": "/models"}]), container("other")]),
        "our volume, mounted elsewhere": shaped("mounted-elsewhere", cache, volumes=[
            {**own, "name": "weightd-model"}], containers=[
            container("main", volumeMounts=[{"name": "weightd-model", "mountPath": "/m"}]), container("other")]),
        "no model": shaped("no-model", {"weightd.io/model": "org/model"}),
        "blank": shaped("blank", {"weightd.io/model": " "}),
        "another volume of the name": shaped("taken", model, volumes=[{"name": "weightd-model", "emptyDir": {}}]),
        "a mount in the way": shaped("in-the-way", model, volumes=[{"name": "data", "emptyDir": {}}], containers=[
            container("main", volumeMounts=[{"name": "data", "mountPath": "/models/lora"}]), container("other")]),
        "our volume, not mounted": shaped("not-mounted", model, volumes=[{**own, "name": "weightd-model"}]),
        "a volume of another model": shaped("two-models", {**model, "weightd.io/volume.mine": "hf://org/other"},
                                            volumes=[own]),
        "own environment": shaped("own-environment", cache, containers=[
            container("main", env=[{"name": "HF_HUB_OFFLINE", "value": "0"}, {"name": "A", "value": "b"}])]),
        "cache in a bucket": shaped("bucket-cache", {**cache, "weightd.io/model": "s3://bucket/x"}),
        "long name": shaped("long-name", {"weightd.io/model": f"s3://bucket/{'x' * 60}"}),
    }


def others():
    """Pods without it."""
    return [shaped("bare", {}), shaped("foreign", {"example.com/model": "hf://org/model"}),
            shaped("half", {"weightd.io/mount-path": "/models"})]


def admitted(admin, thing):
    """The pod that the API server would keep, without what differs from one request to the next."""
    made = admin.create(thing, dryRun="All")
    for key in ["uid", "creationTimestamp", "managedFields", "resourceVersion", "generation"]:
        made["metadata"].pop(key, None)
    return made


def the_chart_turns_the_webhook_on(controller):
    """At the port that its service leads to, for the name that API servers know it by."""
    settings, template = controller.config.get("controller", {}), controller.deployment["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    same("where it listens", settings.get("webhook", "").rpartition(":")[2], str(ports["webhook"]))
    same("its service", settings.get("service", "weightd-webhook"), controller.service["metadata"]["name"])
    return settings["webhook"]


def without_controller_pods_are_created(controller):
    """The chart is installed, and nobody answers."""
    controller.unanswered = {}
    started = time.monotonic()
    for what, thing in questions().items():
        controller.unanswered[what] = admitted(controller.admin, thing)
        same(f"volumes of {what}", controller.unanswered[what]["spec"].get("volumes"), thing["spec"].get("volumes"))
    seconds = time.monotonic() - started
    controller.others = [admitted(controller.admin, thing) for thing in others()]
    return f"{len(controller.unanswered)} pods in {seconds:.1f} s, as they were written"


def one_of_two_leads(controller):
    started = time.monotonic()
    for name in REPLICAS:
        controller.start_replica(name)
    leader = eventually("a replica leads", controller.leader, seconds=60)
    seconds = time.monotonic() - started
    time.sleep(3)
    same("leader a while later", controller.leader(), leader)
    return f"elected {seconds:.1f} s after the start"


def the_leader_makes_the_certificate(controller):
    admin = controller.admin

    def told():
        [webhook] = admin.get(WEBHOOK)["webhooks"]
        return webhook["clientConfig"].get("caBundle")

    eventually("the webhook's caBundle", told, seconds=60)
    secret = admin.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/weightd-webhook-certificate")
    controller.publish(*REPLICAS)
    return f"Secret with {', '.join(sorted(secret['data']))}, caBundle in the webhook's configuration"


def volume_of(made):
    return next((each for each in made["spec"].get("volumes", []) if each["name"] == "weightd-model"), None)


def a_pod_gets_what_it_asks_for(controller):
    """From the API server itself, which asked one of the replicas."""
    admin, asked = controller.admin, questions()
    eventually("the webhook is asked", lambda: volume_of(admitted(admin, asked["plain"])), seconds=60)
    controller.answered = {what: admitted(admin, thing) for what, thing in asked.items()}
    plain = controller.answered["plain"]["spec"]
    attributes = {"source": "hf://org/model"}
    same("volume", plain["volumes"], [
        {"name": "weightd-model", "csi": {"driver": "csi.weightd.io", "readOnly": True, "volumeAttributes": attributes}}])
    mount = {"name": "weightd-model", "mountPath": "/models", "readOnly": True}
    same("mounts", plain["containers"][0]["volumeMounts"], [mount])
    same("preference", preferences(plain), [(100, "model.weightd.io/hf.org.model", "Exists", None)])
    pinned = controller.answered["pinned"]["spec"]
    same("preference of a commit", preferences(pinned), [(100, "model.weightd.io/hf.org.model", "In", [COMMIT])])
    cache = controller.answered["cache"]["spec"]
    for each in cache["containers"]:
        env = {one["name"]: one["value"] for one in each["env"]}
        same("environment", env, {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/models"})
    same("layout", volume_of(controller.answered["cache"])["csi"]["volumeAttributes"]["layout"], "hf-cache")
    elsewhere = controller.answered["elsewhere"]["spec"]["containers"][0]["volumeMounts"]
    same("mount path", [each["mountPath"] for each in elsewhere], ["/weights"])
    same("Secret", volume_of(controller.answered["secret"])["csi"]["nodePublishSecretRef"], {"name": "hub"})
    prepare, sidecar = controller.answered["sidecar"]["spec"]["initContainers"]
    same("mounts of init containers", ("volumeMounts" in prepare, sidecar.get("volumeMounts")), (False, [mount]))
    same("author's preference", preferences(controller.answered["affinity"]["spec"])[0][0], 5)
    same("Secret of a name that there is not", "nodePublishSecretRef" in volume_of(
        controller.answered["a Secret's name with two dots"])["csi"], False)
    main, other = controller.answered["our volume, mounted elsewhere"]["spec"]["containers"]
    caches = [{one["name"]: one["value"] for one in each["env"]}["HF_HUB_CACHE"] for each in (main, other)]
    same("caches where the author mounts the volume, and where not", caches, ["/m", "/models"])
    for what in ["own volume", "relative path", "path upwards", "blank", "another volume of the name", "for Windows",
                 "selects Windows"]:
        same(what, controller.answered[what], controller.unanswered[what])
    same("model without a label", "affinity" in controller.answered["long name"]["spec"], False)
    return f"volume, mounts, environment, preference; {len(asked)} kinds of pods"


def preferences(spec):
    found = []
    for term in spec["affinity"]["nodeAffinity"][PREFERRED]:
        [one] = term["preference"]["matchExpressions"]
        found.append((term["weight"], one["key"], one["operator"], one.get("values")))
    return found


def other_pods_stay_as_they_are(controller):
    admin = controller.admin
    same("pods without the annotation", [admitted(admin, thing) for thing in others()], controller.others)
    at_home = shaped("plain", {"weightd.io/model": "hf://org/model"})
    at_home["metadata"]["namespace"] = NAMESPACE
    same("pod of our own namespace", volume_of(admitted(admin, at_home)), None)
    return f"{len(controller.others)} pods to the letter; and those of our own namespace"


def a_second_pass_changes_nothing(controller):
    for what, made in controller.answered.items():
        same(what, admitted(controller.admin, made), made)
    return f"{len(controller.answered)} pods"


def the_death_of_the_leader_is_survived(controller):
    leader = controller.leader()
    follower = controller.other(leader)
    controller.running[leader].send_signal(signal.SIGKILL)
    controller.running[leader].wait()
    controller.publish(follower)
    started = time.monotonic()
    eventually("pods are still given volumes", lambda: volume_of(admitted(controller.admin, questions()["plain"])))
    answered = time.monotonic() - started
    eventually("the other replica leads", lambda: controller.leader() == follower, seconds=60)
    seconds = time.monotonic() - started
    same("failover within 30 s", seconds < 30, True)
    controller.start_replica(leader)
    controller.publish(*REPLICAS)
    return f"killed with SIGKILL: the other leads after {seconds:.1f} s, webhook answered after {answered:.1f} s"


def a_leader_that_is_asked_to_end_hands_over(controller):
    leader = controller.leader()
    follower = controller.other(leader)
    time.sleep(1)
    started = time.monotonic()
    controller.publish(follower)
    controller.running[leader].terminate()
    eventually("the other replica leads", lambda: controller.leader() == follower, seconds=30)
    seconds = time.monotonic() - started
    same("exit status", controller.running[leader].wait(timeout=30), 0)
    return f"the other leads after {seconds:.1f} s"


def without_replicas_pods_are_created(controller):
    """All replicas are gone at once, and the service does not know yet."""
    for name in REPLICAS:
        controller.running[name].kill()
        controller.running[name].wait()
    started = time.monotonic()
    made = admitted(controller.admin, questions()["plain"])
    seconds = time.monotonic() - started
    same("volume", volume_of(made), None)
    same("seconds it took, below 10", seconds < 10, True)
    return f"after {seconds:.1f} s, without a volume"


def a_policy_does_the_same(cluster, answered, bare):
    """The API server's own MutatingAdmissionPolicy, without controller."""
    admin = cluster.plane.admin
    cluster.install(*WITH_POLICY)
    eventually("the policy is in force", lambda: volume_of(admitted(admin, questions()["plain"])), seconds=60)
    for what, thing in questions().items():
        made = admitted(admin, thing)
        same(f"{what}, from the policy and from the webhook", ordered(made), ordered(answered[what]))
        same(f"{what}, twice", admitted(admin, made), made)
    same("pods without the annotation", [admitted(admin, thing) for thing in others()], bare)
    return f"{len(answered)} kinds of pods get the same, others nothing"


def ordered(made):
    """The order of environment variables and of volumes means nothing here."""
    made = copy.deepcopy(made)
    for each in [*made["spec"]["containers"], *made["spec"].get("initContainers", [])]:
        each.get("env", []).sort(key=lambda one: one["name"])
    return yaml.safe_dump(made)


def run(cluster, check):
    cluster.plane.namespace("team-a")
    with Controller(cluster) as controller:
        for test in [the_chart_turns_the_webhook_on, without_controller_pods_are_created, one_of_two_leads,
                     the_leader_makes_the_certificate, a_pod_gets_what_it_asks_for, other_pods_stay_as_they_are, a_second_pass_changes_nothing,
                     the_death_of_the_leader_is_survived, a_leader_that_is_asked_to_end_hands_over,
                     without_replicas_pods_are_created]:
            check(test, controller)
        controller.publish()
    if any(thing["kind"] == "MutatingAdmissionPolicy" for thing in cluster.render(*WITH_POLICY)):
        check(a_policy_does_the_same, cluster, controller.answered, controller.others)
    else:
        check.leave_out("controller.a_policy_does_the_same", "the chart renders no MutatingAdmissionPolicy")
    cluster.install()
