"""Tests of weightd in a cluster: a real API server, what the chart renders, and the programs as they run there.

    python cluster.py --binaries DIR --tools DIR --chart DIR [NAME...]

Runs in namespaces of its own (mounts, network, processes), see `run`. Exits with 0 if every check passed.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from api import place, plural
from control_plane import ControlPlane, eventually
from machine import cgroups, remove_cgroups
from weightd import NAMESPACE

# In this order; each is a file beside this one.
TESTS = ["annotations", "events", "chart", "rights", "policy", "containers", "warm", "controller", "pending", "leader", "kubelet", "scale"]


class Cluster:
    """What the tests share."""

    def __init__(self, plane, work, arguments):
        self.plane, self.work = plane, work
        self.binaries, self.tools, self.chart = arguments.binaries, arguments.tools, arguments.chart
        self.installed = None

    def directory(self, name):
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.work))

    def render(self, *options):
        """The objects of the chart, its custom resources first."""
        command = [self.tools / "helm", "template", "weightd", self.chart, "--namespace", NAMESPACE, "--include-crds"]
        command += ["--kube-version", "1.35", *options]
        own = {**os.environ, "HELM_CACHE_HOME": str(self.work / "helm"), "HELM_CONFIG_HOME": str(self.work / "helm"),
               "HELM_DATA_HOME": str(self.work / "helm")}
        done = subprocess.run(list(map(str, command)), env=own, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AssertionError(f"helm template {' '.join(options)}: {done.stderr}")
        return [thing for thing in yaml.safe_load_all(done.stdout) if thing]

    def install(self, *options):
        """Applies the chart's objects, as strictly as the server can. What was installed before and is not among
        them is removed."""
        if self.installed is not None and self.installed[0] == options:
            return self.installed[1]
        self.plane.namespace(NAMESPACE)
        things = self.render(*options)
        for thing in sorted(things, key=lambda thing: thing["kind"] != "CustomResourceDefinition"):
            if thing["metadata"].get("annotations", {}).get("helm.sh/hook", "").startswith("test"):
                continue
            if "ModelPrefetch" == thing["kind"]:
                eventually("the custom resource", lambda thing=thing: self.plane.admin.apply(thing))
            else:
                self.apply(thing)
        self.remove_others(things)
        self.installed = (options, things)
        return things

    def remove_others(self, things):
        """What an earlier installation had, and this one has not. Custom resources stay, as with helm."""
        paths = {f"{place(thing)}/{thing['metadata']['name']}" for thing in things}
        for thing in self.installed[1] if self.installed else []:
            path = f"{place(thing)}/{thing['metadata']['name']}"
            if path not in paths and thing["kind"] != "CustomResourceDefinition":
                self.plane.admin.delete(path)

    def tidy(self):
        """Removes what a test has left: the next one's kubelet would start its pods."""
        self.plane.namespace("team-a")
        self.plane.admin.delete("/api/v1/namespaces/team-a/pods", seconds=0)
        for path in ["/api/v1/nodes", "/apis/storage.k8s.io/v1/csinodes", "/apis/weightd.io/v1alpha1/modelprefetches"]:
            self.plane.admin.delete(path)

    def apply(self, thing):
        name = f"{thing['kind']} {thing['metadata']['name']}"
        # Helm puts these into the release's namespace by itself.
        if "namespace" not in thing["metadata"]:
            thing["metadata"]["namespace"] = NAMESPACE
        try:
            self.plane.admin.apply(thing, manager="helm")
        except Exception as error:
            raise AssertionError(f"the API server does not take {name} ({plural(thing['kind'])}): {error}") from error


class Checks:
    def __init__(self):
        self.failed, self.left_out = [], []

    def __call__(self, test, *arguments):
        started = time.monotonic()
        name = f"{test.__module__}.{test.__name__}"
        outcome = test(*arguments)
        print(f"ok {name} ({time.monotonic() - started:.1f} s): {outcome}", flush=True)

    def leave_out(self, name, why):
        self.left_out.append(f"{name}: {why}")
        print(f"left out: {name}: {why}", flush=True)


def arguments_of_the_call():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binaries", type=Path, required=True)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--chart", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the directory with the logs")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TESTS)}")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in TESTS:
            parser.error(f"no test {name}; there are: {', '.join(TESTS)}")
    return arguments


def end_all():
    """Ends what tests that failed have left: containers outlive those who started them."""
    if os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()


def main():
    # Else SIGTERM would end the script, and leave what it has made.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    arguments = arguments_of_the_call()
    work = Path(tempfile.mkdtemp(prefix="weightd-cluster-"))
    checks, before = Checks(), cgroups()
    try:
        started = time.monotonic()
        with ControlPlane(work, arguments.tools) as plane:
            print(f"the API server is ready after {time.monotonic() - started:.1f} s", flush=True)
            cluster = Cluster(plane, work, arguments)
            for name in arguments.names or TESTS:
                started = time.monotonic()
                importlib.import_module(name).run(cluster, checks)
                cluster.tidy()
                print(f"-- {name}: {time.monotonic() - started:.1f} s", flush=True)
    finally:
        end_all()
        remove_cgroups(cgroups() - before)
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)
    for reason in checks.left_out:
        print(f"was left out: {reason}")


if __name__ == "__main__":
    sys.exit(main())
