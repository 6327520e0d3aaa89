"""Holds the plugin against the CSI as its community does: with csi-sanity, the daemon and a stand-in Hub.

It runs twice: straight on the plugin's socket, and through a stand-in for the provisioner that the driver
does not have, without which csi-sanity cannot get a volume to mount.

    python csi_sanity.py DIRECTORY-OF-THE-PROGRAMS CSI-SANITY

Needs a mount namespace of its own. Exits with 0 if every check passed.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from concurrent import futures
from xml.etree import ElementTree

import grpc

from node import CALL_SECONDS, MODEL, Node, connect, same

# Specs that ask the plugin alone.
CALLS = {
    "Identity Service GetPluginCapabilities should return appropriate capabilities",
    "Identity Service GetPluginInfo should return appropriate information",
    "Identity Service Probe should return appropriate information",
    "Node Service NodeGetCapabilities should return appropriate capabilities",
    "Node Service NodeGetInfo should return appropriate values",
    "Node Service NodeGetVolumeStats should fail when no volume id is provided",
    "Node Service NodeGetVolumeStats should fail when no volume path is provided",
    "Node Service NodeGetVolumeStats should fail when volume is not found",
    "Node Service NodePublishVolume should fail when no target path is provided",
    "Node Service NodePublishVolume should fail when no volume capability is provided",
    "Node Service NodePublishVolume should fail when no volume id is provided",
    "Node Service NodeUnpublishVolume should fail when no target path is provided",
    "Node Service NodeUnpublishVolume should fail when no volume id is provided",
}
# Specs that ask for a volume first, without a look at whether there is a controller.
UNASKED = {
    "Node Service NodeGetVolumeStats should fail when volume does not exist on the specified path",
    "Node Service NodeUnpublishVolume should remove target path",
}
# The whole life of a volume, published once and published ten times over.
CYCLES = {"Node Service should be idempotent", "Node Service should work"}
# So are named all specs of a controller. They take it for granted that there is one.
CONTROLLER = "[Controller Server]"

# Why csi-sanity skips a spec by itself: the capability that it looked for in vain.
SKIPS = {
    "Controller Service not provided: CreateVolume not supported": "CONTROLLER_SERVICE",
    "GroupControllerService not supported": "GROUP_CONTROLLER_SERVICE",
    "NodeExpandVolume not supported": "EXPAND_VOLUME",
    "NodeGetStorageHealth not supported": "GET_STORAGE_HEALTH",
    "NodeGetVolumeHealth not supported": "GET_VOLUME_HEALTH",
    "NodeStageVolume not supported": "STAGE_UNSTAGE_VOLUME",
    "NodeUnstageVolume not supported": "STAGE_UNSTAGE_VOLUME",
    "Service does not have single node multi writer capability": "SINGLE_NODE_MULTI_WRITER",
}


class Provisioner(grpc.GenericRpcHandler):
    """Makes volumes, and hands all else to the plugin byte for byte, but for what each method below says."""

    def __init__(self, node):
        self.csi, self.channel = node.csi, node.channel
        self.own = {
            "/csi.v1.Identity/GetPluginCapabilities": self.get_plugin_capabilities,
            "/csi.v1.Controller/ControllerGetCapabilities": self.controller_get_capabilities,
            "/csi.v1.Controller/CreateVolume": self.create_volume,
            "/csi.v1.Controller/DeleteVolume": self.delete_volume,
            "/csi.v1.Node/NodePublishVolume": self.node_publish_volume,
        }

    def service(self, details):
        method = details.method

        def answer(request, context):
            try:
                own = self.own.get(method)
                return own(method, request) if own else self.forward(method, request)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.unary_unary_rpc_method_handler(answer)

    def forward(self, method, request):
        return self.channel.unary_unary(method)(request, timeout=CALL_SECONDS)

    def get_plugin_capabilities(self, method, request):
        answer = self.csi.GetPluginCapabilitiesResponse.FromString(self.forward(method, request))
        service = answer.capabilities.add().service
        service.type = service.CONTROLLER_SERVICE
        return answer.SerializeToString()

    def controller_get_capabilities(self, _method, _request):
        answer = self.csi.ControllerGetCapabilitiesResponse()
        rpc = answer.capabilities.add().rpc
        rpc.type = rpc.CREATE_DELETE_VOLUME
        return answer.SerializeToString()

    def create_volume(self, _method, request):
        name = self.csi.CreateVolumeRequest.FromString(request).name
        volume = self.csi.Volume(volume_id=name, volume_context={"source": MODEL})
        return self.csi.CreateVolumeResponse(volume=volume).SerializeToString()

    def delete_volume(self, _method, _request):
        return self.csi.DeleteVolumeResponse().SerializeToString()

    def node_publish_volume(self, method, request):
        # csi-sanity publishes for writing, which this driver refuses: a model is read-only.
        changed = self.csi.NodePublishVolumeRequest.FromString(request)
        changed.readonly = True
        return self.forward(method, changed.SerializeToString())


@contextlib.contextmanager
def provisioner(node):
    """Serves a provisioner; yields its socket."""
    socket = node.work / "provisioner.sock"
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    server.add_generic_rpc_handlers((Provisioner(node),))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        yield socket
    finally:
        server.stop(grace=None).wait()


def capabilities(node, socket):
    """Names of all that the driver behind a socket says it can do."""
    csi, names = node.csi, set()
    with connect(socket) as channel:
        identity = node.stubs.IdentityStub(channel)
        answer = identity.GetPluginCapabilities(csi.GetPluginCapabilitiesRequest(), timeout=CALL_SECONDS)
        types = csi.PluginCapability.Service.Type
        names |= {types.Name(entry.service.type) for entry in answer.capabilities}
        plugin = node.stubs.NodeStub(channel)
        answer = plugin.NodeGetCapabilities(csi.NodeGetCapabilitiesRequest(), timeout=CALL_SECONDS)
        types = csi.NodeServiceCapability.RPC.Type
        return names | {types.Name(entry.rpc.type) for entry in answer.capabilities}


def run(program, node, socket, *options):
    """Runs csi-sanity; returns the names of the specs that passed, and why others were skipped."""
    # It makes the last directory and removes it, and mounts at `target` in it.
    volume = node.kubelet / "pods/sanity/volumes/kubernetes.io~csi/model"
    volume.parent.mkdir(parents=True, exist_ok=True)
    report = node.work / "junit.xml"
    report.unlink(missing_ok=True)
    command = [program, f"--csi.endpoint=unix://{socket}", f"--csi.mountdir={volume}"]
    command += [f"--csi.stagingdir={node.work / 'staging'}", f"--ginkgo.junit-report={report}"]
    # The order is drawn by lot. A failure that depends on it should come again.
    command += ["--ginkgo.seed=1", "--ginkgo.no-color", *options]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    if not report.exists():
        raise AssertionError(f"csi-sanity ended with {ended.returncode}:\n{ended.stdout}")
    passed, skipped, other = set(), {}, []
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name").removeprefix("[It] ")
        match case.get("status"):
            case "passed":
                passed.add(name)
            case "skipped":
                skipped[name] = case.find("skipped").get("message").removeprefix("skipped - ")
            # A spec that its authors have switched off.
            case "pending":
                pass
            case status:
                other.append((name, status))
    if other or ended.returncode != 0:
        raise AssertionError(f"csi-sanity failed at {other}:\n{ended.stdout}")
    same("directories that are left", list(volume.parent.iterdir()), [])
    return passed, skipped


def check(what, node, socket, passed, skipped, expected, left_out):
    """All that is expected passed, and what was skipped is left out or not among the capabilities."""
    if missing := expected - passed:
        raise AssertionError(f"{what}: not run: {sorted(missing)}")
    able = capabilities(node, socket)
    for name, why in skipped.items():
        if left_out(name):
            continue
        if SKIPS.get(why) is None or SKIPS[why] in able:
            raise AssertionError(f"{what}: {name}: skipped: {why}; capabilities: {sorted(able)}")
    node.nothing_is_left()
    chosen = sum(not left_out(name) for name in skipped)
    print(f"csi-sanity {what}: {len(passed)} passed, {chosen} skipped for a capability that there is not")


def main(binaries, program):
    with tempfile.TemporaryDirectory() as work, Node(binaries, work) as node:
        leave_out = [re.escape(text) for text in (CONTROLLER, *UNASKED)]
        options = [f"--ginkgo.skip={text}" for text in leave_out]
        outcome = run(program, node, node.socket, *options)
        check(
            "on the plugin", node, node.socket, *outcome, CALLS,
            lambda name: CONTROLLER in name or name in UNASKED,
        )
        with provisioner(node) as socket:
            services = ("Identity Service", "Node Service")
            options = [f"--ginkgo.focus={service}" for service in services]
            outcome = run(program, node, socket, *options)
            check(
                "with a provisioner", node, socket, *outcome, CALLS | UNASKED | CYCLES,
                lambda name: not name.startswith(services),
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
