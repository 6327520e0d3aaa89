"""Every object of deploy/karpenter and deploy/examples, to a real API server, as a dry run: schemas, the rules beside them, and what
pods Pod Security lets in. Run by check/run, which names kube-apiserver if there is one; etcd is Debian's.

    api.py KUBE_APISERVER CRD_DIR...
"""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import common
from common import KARPENTER, check, objects, text_of
from examples import manifests, pods

# Kinds without a CRD that we could install.
FOREIGN = {"NodeClass", "ClusterConfig"}
PLURALS = {"NodeClass": "nodeclasses", "EC2NodeClass": "ec2nodeclasses"}
CLUSTER_WIDE = {"EC2NodeClass", "NodePool"}
# The strictest level of Pod Security that takes the pods of an example. EFA's capability fits none.
LEVELS = {
    "deepseek-r1-llama-8b-rayservice.yaml": "restricted",
    "vllm-deployment.yaml": "baseline",
    "scout.yaml": "baseline",
    "maverick-fp8.yaml": "baseline",
    "leaderworkerset.yaml": "privileged",
}
DRIVER = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "CSIDriver",
    "metadata": {"name": "csi.weightd.io", "labels": {"security.openshift.io/csi-ephemeral-volume-profile": "restricted"}},
    "spec": {"attachRequired": False, "podInfoOnMount": True, "volumeLifecycleModes": ["Ephemeral", "Persistent"]},
}


def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """The one of a control plane that lives as long as this object is entered."""

    def __init__(self, program, work):
        self.port, clients, peers = port(), port(), port()
        store = f"http://127.0.0.1:{clients}"
        self.commands = [
            ["etcd", "--data-dir", work / "etcd", "--listen-client-urls", store, "--advertise-client-urls", store,
             "--listen-peer-urls", f"http://127.0.0.1:{peers}"],
            [program, "--etcd-servers", store, "--bind-address", "127.0.0.1", "--secure-port", self.port, "--cert-dir", work / "certificates",
             "--service-account-key-file", work / "key", "--service-account-signing-key-file", work / "key",
             "--service-account-issuer", "https://kubernetes.default.svc", "--token-auth-file", work / "tokens",
             "--authorization-mode", "RBAC", "--service-cluster-ip-range", "10.0.0.0/24", "--disable-admission-plugins", "ServiceAccount"],
        ]
        subprocess.run(["openssl", "genrsa", "-out", work / "key", "2048"], check=True, capture_output=True)
        (work / "tokens").write_text("token,admin,1,system:masters\n")
        self.work, self.running = work, []

    def __enter__(self):
        try:
            for command in self.commands:
                log = (self.work / f"{Path(command[0]).name}.log").open("w")
                self.running.append(subprocess.Popen([str(word) for word in command], stdout=log, stderr=log))
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for one in reversed(self.running):
            one.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(20)
            one.kill()

    def call(self, method, path, body=None):
        """Status, and the answer or what is wrong."""
        data = None if body is None else json.dumps(body, default=str).encode()
        headers = {"Authorization": "Bearer token", "Content-Type": "application/json"}
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", method=method, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, context=ssl._create_unverified_context(), timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def eventually(self, what, path):
        for _ in range(240):
            status, answer = self.call("GET", path)
            if status == 200:
                return
            time.sleep(0.25)
        sys.exit(f"check: waited in vain for {what}: {status} {answer[:300]}\n{(self.work / 'kube-apiserver.log').read_text()[-600:]}")


def path_of(one, namespace):
    group, _, version = one["apiVersion"].rpartition("/")
    plural = PLURALS.get(one["kind"], one["kind"].lower() + "s")
    inside = "" if one["kind"] in CLUSTER_WIDE else f"/namespaces/{namespace}"
    return f"/{f'apis/{group}' if group else 'api'}/{version}{inside}/{plural}"


def install(server, directories):
    made = []
    for file in (file for directory in directories for file in sorted(Path(directory).glob("*.yaml"))):
        for crd in objects(file.read_text()):
            # Versions are converted by programs that do not run here.
            crd["spec"].pop("conversion", None)
            status, answer = server.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
            check(f"{file.name} is taken", status == 201, answer[:300])
            names, version = crd["spec"]["names"], crd["spec"]["versions"][0]["name"]
            made.append(f"/apis/{crd['spec']['group']}/{version}/{names['plural']}")
    for path in made:
        server.eventually(path, path)
    server.call("POST", "/apis/storage.k8s.io/v1/csidrivers", DRIVER)
    for level in ("restricted", "baseline", "privileged"):
        labels = {"pod-security.kubernetes.io/enforce": level}
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": level, "labels": labels}}
        server.call("POST", "/api/v1/namespaces", namespace)


def taken(server, name, one, namespace):
    path = path_of(one, namespace) + "?dryRun=All&fieldValidation=Strict"
    status, answer = server.call("POST", path, one)
    check(f"{name}: the API server takes {one['kind']} in a namespace of level {namespace}", status == 201, answer[:600])


def try_all(server):
    texts = [(path.name, text_of(path)) for path in sorted(KARPENTER.glob("*.yaml"))]
    texts += [(path.name, text) for path, _, text in manifests()]
    count = 0
    for name, text in texts:
        level = LEVELS.get(name, "privileged")
        for one in objects(text):
            if one["kind"] in FOREIGN:
                continue
            taken(server, name, one, level)
            count += 1
            for pod in pods(one):
                metadata = {**pod.get("metadata", {}), "name": "pod"}
                taken(server, name, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}, level)
                count += 1
    return count


def main():
    program, *directories = sys.argv[1:]
    program = program or "kube-apiserver"
    if not shutil.which(program) or not shutil.which("etcd"):
        print("check: the API server: SKIPPED, no kube-apiserver (tests/cluster/run builds it) or no etcd")
        return
    with tempfile.TemporaryDirectory() as work, Server(program, Path(work)) as server:
        server.eventually("the API server", "/readyz")
        install(server, directories)
        print(f"check: {try_all(server)} objects tried")
    common.finish("the API server")


if __name__ == "__main__":
    main()
