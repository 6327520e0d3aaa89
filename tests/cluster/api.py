"""A client of an API server that sends what it is told, and gives back what it got."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import urllib3
import yaml

# Where objects of a kind are, of the kinds whose place differs from `/apis/<version>/<kind in small letters>s`.
PLURALS = {
    "EndpointSlice": "endpointslices",
    "Ingress": "ingresses",
    "MutatingAdmissionPolicy": "mutatingadmissionpolicies",
    "NetworkPolicy": "networkpolicies",
    "ModelPrefetch": "modelprefetches",
    "StorageClass": "storageclasses",
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
}
CLUSTER_WIDE = {
    "ClusterRole",
    "ClusterRoleBinding",
    "CSIDriver",
    "CSINode",
    "CustomResourceDefinition",
    "ModelPrefetch",
    "MutatingAdmissionPolicy",
    "MutatingAdmissionPolicyBinding",
    "MutatingWebhookConfiguration",
    "Namespace",
    "Node",
    "PersistentVolume",
    "PriorityClass",
    "SelfSubjectAccessReview",
    "StorageClass",
    "SubjectAccessReview",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}


class Refused(Exception):
    """An answer of the server that is none of 2xx."""

    def __init__(self, status, reason, message):
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message


class Api:
    """One user's view of the API server."""

    def __init__(self, server, ca, token):
        self.server, self.ca, self.token = server, ca, token
        self.pool = urllib3.PoolManager(ca_certs=str(ca), maxsize=16, block=True)

    def call(self, method, path, body=None, kind="application/json", accept="application/json", **query):
        query = urlencode(query)
        try:
            answer = self.pool.request(
                method,
                f"{self.server}{path}" + (f"?{query}" if query else ""),
                body=None if body is None else json.dumps(body),
                headers={"Authorization": f"Bearer {self.token}", "Content-Type": kind,
                         "Accept": accept},
                timeout=60,
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(f"{method} {path}: {error}") from None
        if answer.status >= 300:
            try:
                status = json.loads(answer.data)
            except ValueError:
                status = {"message": answer.data.decode(errors="replace")}
            raise Refused(answer.status, status.get("reason"), status.get("message"))
        text = answer.data.decode()
        if "watch=true" in query:
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text) if text.startswith("{") else text

    def get(self, path, **query):
        return self.call("GET", path, **query)

    def create(self, thing, **query):
        """Creates an object; a field that the server does not know is an error, not a warning."""
        return self.call("POST", place(thing), thing, fieldValidation="Strict", **query)

    def apply(self, thing, manager="test", part="", **query):
        """Server-side apply, to a part such as `/status` if that is named."""
        path = f"{place(thing)}/{thing['metadata']['name']}{part}"
        query |= {"fieldManager": manager, "force": "true", "fieldValidation": "Strict"}
        return self.call("PATCH", path, thing, "application/apply-patch+yaml", **query)

    def merge(self, path, change):
        return self.call("PATCH", path, change, "application/merge-patch+json")

    def delete(self, path, seconds=None):
        options = {} if seconds is None else {"gracePeriodSeconds": seconds}
        return self.call("DELETE", path, options or None)

    def exists(self, path):
        try:
            self.get(path)
        except Refused as error:
            if error.status == 404:
                return False
            raise
        return True

    def all(self, things):
        """Creates many objects, several at once."""
        with ThreadPoolExecutor(16) as workers:
            return list(workers.map(self.create, things))

    def kubeconfig(self, path):
        """Writes the file that programs are given to be this user."""
        cluster = {"server": self.server, "certificate-authority": str(self.ca)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(content))
        return path


def place(thing):
    """The path of the collection that an object is created in."""
    version, kind = thing["apiVersion"], thing["kind"]
    root = f"/api/{version}" if version == "v1" else f"/apis/{version}"
    if kind not in CLUSTER_WIDE:
        root += f"/namespaces/{thing['metadata'].get('namespace', 'default')}"
    return f"{root}/{plural(kind)}"


def plural(kind):
    return PLURALS.get(kind, f"{kind.lower()}s")


@contextlib.contextmanager
def refused(what, *statuses):
    """The block must end in an answer with one of these statuses."""
    try:
        yield
    except Refused as error:
        if error.status not in statuses:
            raise AssertionError(f"{what}: got {error}, expected {statuses}") from error
    else:
        raise AssertionError(f"{what} was allowed")
