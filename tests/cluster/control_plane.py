"""etcd and a kube-apiserver, as they run in a cluster: own authority, RBAC, service accounts, an audit log.

Runs in a network namespace of its own, so every port is free, and services have addresses that work
without kube-proxy: they are given to `lo`.
"""

import collections
import contextlib
import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from api import Api, Refused

# Of this machine as other machines see it: an Endpoint may be no loopback address.
ADDRESS = "10.200.0.1"
# The first address of the services is the API server's.
SERVICES, SERVICE = "10.96.0.0/24", "10.96.0.1"
SERVER = f"https://{SERVICE}:443"

AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def same(what, got, expected):
    if got != expected:
        raise AssertionError(f"{what}: got {got!r}, expected {expected!r}")


def eventually(what, call, seconds=30, pause=0.05):
    """What `call` gives as soon as that is not false; it may also be refused until then."""
    deadline = time.monotonic() + seconds
    last = None
    while time.monotonic() < deadline:
        try:
            last = call()
        except (Refused, OSError, KeyError, IndexError) as error:
            last = error
        if last and not isinstance(last, Exception):
            return last
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s: {what} (last: {last!r})")


def end_with_parent():
    # PR_SET_PDEATHSIG: nothing that was started here outlives the script, however that ends.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Processes:
    """Programs that end with the `with` block. Each has a log in `work`, shown if the block fails."""

    def __init__(self, work):
        self.work = work
        self.undo = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.show_logs()
        self.undo.close()

    def show_logs(self):
        for log in sorted(self.work.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-25:]
            print(f"--- the end of {log.name}", *lines, sep="\n", file=sys.stderr)

    def start(self, name, *command, **options):
        log = self.undo.enter_context(open(self.work / f"{name}.log", "a"))
        options.setdefault("stdout", log)
        arguments = [str(word) for word in command]
        process = subprocess.Popen(arguments, stderr=log, preexec_fn=end_with_parent, **options)
        self.undo.callback(end, process, seconds=0)
        return process

    def log(self, name):
        return (self.work / f"{name}.log").read_text(errors="replace")


def end(process, seconds=20):
    """Asks a program to end, then makes it. Gives its status."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class ControlPlane(Processes):
    """`tools` is the directory with kube-apiserver."""

    def __init__(self, work, tools):
        super().__init__(work)
        self.tools, self.ca = tools, work / "ca.crt"
        self.tokens = {"admin": secrets.token_hex(16)}

    def __enter__(self):
        for address in [ADDRESS, SERVICE]:
            subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        self.make_keys()
        with contextlib.ExitStack() as failed:
            failed.push(lambda *error: super(ControlPlane, self).__exit__(*error))
            self.start_etcd()
            self.start_server()
            failed.pop_all()
        return self

    def make_keys(self):
        names = f"subjectAltName=IP:{SERVICE},IP:{ADDRESS},DNS:kubernetes.default.svc"
        self.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                     "-subj", "/CN=cluster-ca", "-keyout", "ca.key", "-out", "ca.crt")
        self.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                     "-subj", "/CN=kube-apiserver", "-addext", names, "-addext", "basicConstraints=critical,CA:FALSE",
                     "-CA", "ca.crt", "-CAkey", "ca.key", "-keyout", "server.key", "-out", "server.crt")
        self.openssl("genrsa", "-out", "accounts.key", "2048")
        self.openssl("rsa", "-in", "accounts.key", "-pubout", "-out", "accounts.pub")

    def openssl(self, *arguments):
        subprocess.run(["openssl", *arguments], cwd=self.work, check=True, capture_output=True)

    def start_etcd(self):
        etcd = "http://127.0.0.1:2379"
        self.start("etcd", "etcd", "--data-dir", self.work / "etcd", "--listen-client-urls", etcd,
                   "--advertise-client-urls", etcd, "--listen-peer-urls", "http://127.0.0.1:2380",
                   env={**os.environ, "ETCD_UNSUPPORTED_ARCH": os.uname().machine.replace("aarch64", "arm64")})

    def start_server(self):
        work = self.work
        (work / "audit.yaml").write_text(yaml.safe_dump(AUDIT))
        groups = "system:masters"
        node_groups = "system:nodes"
        for node in ["node-1", "node-2"]:
            self.tokens[f"system:node:{node}"] = secrets.token_hex(16)
        lines = [f'{token},{user},{user},"{groups if user == "admin" else node_groups}"'
                 for user, token in self.tokens.items()]
        (work / "tokens.csv").write_text("\n".join(lines) + "\n")
        self.server = self.start(
            "kube-apiserver", self.tools / "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            "--bind-address=0.0.0.0", "--secure-port=443", f"--advertise-address={ADDRESS}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--tls-cert-file={work / 'server.crt'}", f"--tls-private-key-file={work / 'server.key'}",
            f"--token-auth-file={work / 'tokens.csv'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={work / 'accounts.pub'}",
            f"--service-account-signing-key-file={work / 'accounts.key'}",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            # Without kube-proxy it must find what is behind a service by itself.
            "--enable-aggregator-routing=true",
            "--feature-gates=MutatingAdmissionPolicy=true",
            "--runtime-config=admissionregistration.k8s.io/v1beta1=true",
            f"--audit-policy-file={work / 'audit.yaml'}", f"--audit-log-path={work / 'audit.json'}",
            "--audit-log-mode=batch", "--audit-log-batch-max-wait=500ms",
        )
        self.admin = Api(SERVER, self.ca, self.tokens["admin"])
        eventually("the API server is ready", self.ready, seconds=90, pause=0.2)

    def ready(self):
        if self.server.poll() is not None:
            raise RuntimeError("the API server has ended")
        return self.admin.get("/readyz") == "ok"

    def namespace(self, name):
        """A namespace, with what controllers of a whole cluster put into it."""
        self.admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        about = {"namespace": name}
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", **about}}
        self.admin.apply(account)
        roots = {"ca.crt": self.ca.read_text()}
        about = {"name": "kube-root-ca.crt", **about}
        self.admin.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": roots})
        return name

    def account(self, name, namespace="weightd", pod=None):
        """The API server as a service account sees it, with a real token; of a pod, as kubelet gets it, if that is named."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        bound = {"boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod}} if pod else {}
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": bound}
        return Api(SERVER, self.ca, self.admin.call("POST", path, request)["status"]["token"])

    def node(self, name):
        """The API server as kubelet of a node sees it."""
        return Api(SERVER, self.ca, self.tokens[f"system:node:{name}"])

    def audit(self):
        """What was asked of the API server so far, each request once."""
        requests = collections.OrderedDict()
        for line in (self.work / "audit.json").read_text().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                requests[event["auditID"]] = event
        return list(requests.values())
