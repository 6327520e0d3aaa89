"""The DaemonSet's pod as a container runtime makes it of what the chart renders: mounts, propagation, read-only roots,
capabilities. Kubelet and runtime are left out; what they would do is done by hand."""

import contextlib
import shlex
import shutil
import signal
import subprocess
import time

import grpc
from control_plane import SERVICE, eventually, same
from node import CALL_SECONDS, connect, stubs
from weightd import NAMESPACE

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
KUBELET = "/var/lib/kubelet"
PROPAGATION = {None: "rprivate", "None": "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}
# The real image has static binaries and none of these.
SYSTEM = ["/usr", "/bin", "/lib", "/lib64"]


class Host:
    """A node's directories, shared as systemd shares them, and containers that see what their spec says."""

    def __init__(self, cluster, undo):
        self.cluster, self.undo, self.work = cluster, undo, cluster.directory("containers")
        self.work.chmod(0o755)
        self.root = self.work / "host"
        self.root.mkdir()
        self.sh(f"mount --bind {self.root} {self.root} && mount --make-shared {self.root}")
        undo.callback(self.sh, f"umount -R -l {self.root}")
        (self.root / "models").mkdir()
        (self.root / "models/config.json").write_text("{}")
        (self.root / "models/weights.bin").write_bytes(b"weights" * 1000)
        things = cluster.render(
            "--set-json", 'config={"file":{"allow":["/models"]}}',
            "--set-json", 'node.extraVolumes=[{"name":"models","hostPath":{"path":"/models"}}]',
            "--set-json", 'node.daemon.extraVolumeMounts=[{"name":"models","mountPath":"/models","readOnly":true}]',
        )
        self.settings = next(t["data"] for t in things if t["kind"] == "ConfigMap")
        (daemons,) = (thing for thing in things if thing["kind"] == "DaemonSet")
        self.spec = daemons["spec"]["template"]["spec"]
        self.running = {}

    def sh(self, script):
        subprocess.run(["sh", "-ec", script], check=True)

    def path(self, path):
        return self.root / path.lstrip("/")

    def source(self, name):
        (volume,) = (volume for volume in self.spec["volumes"] if volume["name"] == name)
        if "hostPath" in volume:
            directory = self.path(volume["hostPath"]["path"])
        else:
            directory = self.work / "config"
            for file, text in self.settings.items():
                directory.mkdir(exist_ok=True)
                (directory / file).write_text(text)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def account(self):
        directory = self.work / "account"
        directory.mkdir(exist_ok=True)
        (directory / "token").write_text(self.cluster.plane.account("weightd-node").token)
        (directory / "ca.crt").write_text(self.cluster.plane.ca.read_text())
        (directory / "namespace").write_text(NAMESPACE)
        return directory

    def script(self, container):
        """Makes the container's root, and becomes its program."""
        root, lines = self.work / f"root-{container['name']}", ["mount -t tmpfs none $R"]

        def bind(source, target, propagation="rprivate", read_only=True):
            quoted = shlex.quote(str(source))
            lines.append(f"if [ -d {quoted} ]; then mkdir -p $R{target}; else mkdir -p $(dirname $R{target}); "
                         f"touch $R{target}; fi")
            lines.append(f"mount --rbind {quoted} $R{target} && mount --make-{propagation} $R{target}")
            if read_only:
                lines.append(f"mount -o remount,bind,ro $R{target}")

        for directory in SYSTEM:
            bind(directory, directory)
        for device in ("null", "urandom", "random"):
            bind(f"/dev/{device}", f"/dev/{device}", read_only=False)
        lines.append("mkdir $R/proc && mount -t proc proc $R/proc")
        bind("/etc/ssl/certs", "/etc/ssl/certs")
        for name in ("weightd", "weightd-csi", "weightctl"):
            bind(self.cluster.binaries.resolve() / name, f"/opt/{name}")
        bind(self.account(), ACCOUNT)
        for mount in container["volumeMounts"]:
            propagation = PROPAGATION[mount.get("mountPropagation")]
            bind(self.source(mount["name"]), mount["mountPath"], propagation, mount.get("readOnly", False))
        context = container["securityContext"]
        if context["readOnlyRootFilesystem"]:
            lines.append("mount -o remount,ro $R")
        env = {"KUBERNETES_SERVICE_HOST": SERVICE, "KUBERNETES_SERVICE_PORT": "443", "NODE_NAME": "node-1"}
        env |= {one["name"]: one["value"] for one in container["env"] if "value" in one}
        program = container["command"][0].replace("/usr/local/bin/", "/opt/")
        arguments = [word.replace("$(NODE_NAME)", "node-1") for word in container["args"]]
        drop = [] if context.get("privileged") else ["--no-new-privs", "--drop=all"]
        words = ["env", "-i", *(f"{key}={value}" for key, value in env.items()),
                 shutil.which("capsh"), f"--chroot={root}", *drop, f"--shell={program}", "--", *arguments]
        lines.append("exec " + shlex.join(words))
        root.mkdir(exist_ok=True)
        return f"R={root}\n" + "\n".join(lines)

    def start(self, name):
        (container,) = (one for one in self.spec["containers"] if one["name"] == name)
        log = open(self.work / f"{name}.log", "a")
        command = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-ec", self.script(container)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()
        self.running[name] = process
        self.undo.callback(self.end, process)
        return process

    def end(self, process, how=signal.SIGTERM):
        process.send_signal(how)
        process.wait(timeout=30)

    def log(self, name):
        return (self.work / f"{name}.log").read_text()

    def capabilities(self, name):
        status = open(f"/proc/{self.running[name].pid}/status").read()
        return next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))


class Calls:
    """Kubelet's, on the plugin's socket."""

    def __init__(self, host, csi, csi_stubs):
        self.host, self.csi, self.stubs = host, csi, csi_stubs

    @contextlib.contextmanager
    def plugin(self):
        socket = self.host.path(f"{KUBELET}/plugins/csi.weightd.io/csi.sock")
        # sun_path takes 107 bytes.
        short = self.host.cluster.work / "csi.sock"
        short.unlink(missing_ok=True)
        short.symlink_to(socket)
        with connect(short) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
            yield self.stubs.NodeStub(channel)

    def target(self, uid):
        return f"{KUBELET}/pods/{uid}/volumes/kubernetes.io~csi/model/mount"

    def publish(self, uid, **attributes):
        self.host.path(self.target(uid)).parent.mkdir(parents=True, exist_ok=True)
        keys = {"pod.uid": uid, "pod.name": uid, "pod.namespace": "team-a", "ephemeral": "true"}
        context = {"source": "file:///models", "include": "*", **attributes}
        context |= {f"csi.storage.k8s.io/{key}": value for key, value in keys.items()}
        request = self.csi.NodePublishVolumeRequest(
            volume_id=f"csi-{uid}", target_path=self.target(uid), readonly=True, volume_context=context
        )
        request.volume_capability.mount.SetInParent()
        request.volume_capability.access_mode.mode = self.csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
        with self.plugin() as plugin:
            plugin.NodePublishVolume(request, timeout=CALL_SECONDS)
        return self.host.path(self.target(uid))

    def unpublish(self, uid):
        request = self.csi.NodeUnpublishVolumeRequest(volume_id=f"csi-{uid}", target_path=self.target(uid))
        with self.plugin() as plugin:
            plugin.NodeUnpublishVolume(request, timeout=CALL_SECONDS)


def is_the_model(tree):
    same("files", sorted(path.name for path in tree.iterdir()), ["config.json", "weights.bin"])
    same("bytes", (tree / "weights.bin").read_bytes(), b"weights" * 1000)


def the_node_sees_what_the_plugin_mounts(host, calls):
    is_the_model(calls.publish("pod-1"))
    same("capabilities of the daemon", int(host.capabilities("daemon"), 16), 0)
    if int(host.capabilities("plugin"), 16) == 0:
        raise AssertionError("the plugin has no capabilities")
    return "with a daemon that has no capability, a read-only root, and a plugin that sees the store read-only"


def containers_may_restart_in_any_order(host, calls):
    mounted = host.path(calls.target("pod-1"))
    for number, order in enumerate((["daemon", "plugin"], ["plugin", "daemon"]), 2):
        for name in order:
            host.end(host.running[name], signal.SIGKILL)
            is_the_model(mounted)
        for name in reversed(order):
            host.start(name)
            is_the_model(mounted)
        is_the_model(eventually("published", lambda uid=f"pod-{number}": calls.publish(uid)))
    return "what is mounted is read on, and new volumes come"


def all_is_unmounted(host, calls):
    for uid in ("pod-1", "pod-2", "pod-3"):
        calls.unpublish(uid)
        if host.path(calls.target(uid)).exists():
            raise AssertionError(f"{uid} still has its directory")
    mounts = open("/proc/self/mountinfo").read()
    if "kubernetes.io~csi" in mounts:
        raise AssertionError(mounts)
    return "nothing is left mounted on the node"


def run(cluster, checks):
    cluster.install()
    cluster.plane.admin.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}})
    with contextlib.ExitStack() as undo:
        host = Host(cluster, undo)
        host.path(f"{KUBELET}/pods").mkdir(parents=True)
        calls = Calls(host, *stubs(host.work / "stubs"))
        started = time.monotonic()
        try:
            for name in ("daemon", "plugin"):
                host.start(name)
            checks(the_node_sees_what_the_plugin_mounts, host, calls)
            checks(containers_may_restart_in_any_order, host, calls)
            checks(all_is_unmounted, host, calls)
        except BaseException:
            print(f"after {time.monotonic() - started:.1f} s", host.log("daemon"), host.log("plugin"), sep="\n")
            raise
