"""A machine that has joined the cluster: containerd and kubelet, all of it below one directory.

Nothing of the host is changed: mounts are made in the script's own namespace, the kernel's settings that
kubelet wants are shown to it by files, and directories that it writes to are hidden.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import yaml

from control_plane import ADDRESS, Processes, eventually
from weightd import toml

CGROUPS = Path("/sys/fs/cgroup")
PAUSE, READER = "weightd.test/pause:1", "weightd.test/reader:1"
SIDECAR, WEIGHTD = "weightd.test/sidecar:1", "weightd.test/weightd:1"

# Where containerd, runc and kubelet write whatever they are told.
HIDDEN = [Path("/run"), Path("/var/lib/kubelet"), Path("/var/log/containers")]

# What kubelet sets. It finds these values, and so has nothing to set on the host.
TUNABLES = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}


def why_not():
    """Why this machine can be no node; `None` if it can."""
    if Path("/proc/self/uid_map").read_text().split()[:3] != ["0", "0", "4294967295"]:
        return "it needs a root that is not one of a user namespace"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlayfs"
    if not Path("/dev/kmsg").exists():
        return "there is no /dev/kmsg"
    probe = (CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS) / "weightd-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"control groups cannot be made: {error}"
    return None


class Machine(Processes):
    """kubelet of `name`."""

    def __init__(self, cluster, name):
        super().__init__(cluster.directory("machine"))
        self.cluster, self.name = cluster, name
        self.kubelet, self.logs = self.work / "kubelet", self.work / "pods"
        self.containerd = self.work / "containerd.sock"

    def __enter__(self):
        self.work.chmod(0o755)
        for folder in HIDDEN:
            self.hide(folder)
        # What kubelet shares with containers must be a mount that can be shared.
        subprocess.run(["mount", "--bind", self.work, self.work], check=True)
        subprocess.run(["mount", "--make-rshared", self.work], check=True)
        self.undo.callback(subprocess.run, ["umount", "--recursive", "--lazy", self.work], check=False)
        try:
            self.start_containerd()
            self.start_kubelet()
        except BaseException:
            self.show_logs()
            self.undo.close()
            raise
        return self

    def hide(self, folder):
        """Puts an empty directory over one of the host's, and makes none there that stays."""
        if not folder.exists():
            folder.mkdir()
            self.undo.callback(folder.rmdir)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
        self.undo.callback(subprocess.run, ["umount", "--lazy", folder], check=True)

    def start_containerd(self):
        runc = {"runtime_type": "io.containerd.runc.v2", "options": {"SystemdCgroup": False}}
        cri = {
            "sandbox_image": PAUSE,
            # Lowering it needs a right that root of a container does not have.
            "restrict_oom_score_adj": True,
            "containerd": {"runtimes": {"runc": runc}},
            "cni": {"bin_dir": str(self.work / "cni"), "conf_dir": str(self.work / "cni")},
        }
        config = {
            "version": 2,
            "root": str(self.work / "containerd"),
            "state": str(self.work / "run"),
            "grpc": {"address": str(self.containerd)},
            "plugins": {
                "io.containerd.grpc.v1.cri": cri,
                "io.containerd.internal.v1.opt": {"path": str(self.work / "opt")},
            },
        }
        file = self.work / "containerd.toml"
        file.write_text(toml(config))
        self.start("containerd", "containerd", "--config", file)
        eventually("containerd answers", lambda: self.ctr("version"), pause=0.2)
        binaries, tools = self.cluster.binaries, self.cluster.tools
        for name in [PAUSE, READER]:
            self.add_image(name, {"reader": tools / "reader"}, ["/reader"])
        self.add_image(SIDECAR, {"sidecar": tools / "sidecar"}, ["/sidecar"])
        # As deploy/Dockerfile makes it, with the libraries that a build for tests needs, and the reader. Some
        # authority there must be: the programs do not start without any.
        files = {"reader": tools / "reader", "etc/ssl/certs/ca-certificates.crt": self.cluster.plane.ca}
        files |= {f"usr/local/bin/{name}": binaries / name for name in ["weightctl", "weightd", "weightd-csi"]}
        self.add_image(WEIGHTD, files, ["/usr/local/bin/weightd"])

    def ctr(self, *arguments):
        command = ["ctr", "--address", self.containerd, "--namespace", "k8s.io", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"ctr {arguments[0]}: {done.stderr}")
        return done.stdout

    def add_image(self, name, files, entrypoint):
        file = self.work / "image.tar"
        write_image(file, name, files, entrypoint)
        self.ctr("images", "import", file)
        file.unlink()

    def start_kubelet(self):
        tunables = self.work / "tunables"
        tunables.mkdir()
        for name, value in TUNABLES.items():
            file, at = tunables / name.replace("/", "."), Path("/proc/sys") / name
            if at.exists():
                file.write_text(f"{value}\n")
                subprocess.run(["mount", "--bind", file, at], check=True)
                self.undo.callback(subprocess.run, ["umount", at], check=False)
        (self.work / "resolv.conf").write_text("")
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": "127.0.0.1",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            "makeIPTablesUtilChains": False,
            "containerRuntimeEndpoint": f"unix://{self.containerd}",
            # The machine's disk may be as full as it likes.
            "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%", "memory.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
            "oomScoreAdj": int(Path("/proc/self/oom_score_adj").read_text()),
            "podLogsDir": str(self.logs),
            "resolvConf": str(self.work / "resolv.conf"),
            "volumePluginDir": str(self.work / "volume-plugins"),
            "registerWithTaints": [{"key": "csi.weightd.io/agent-not-ready", "effect": "NoExecute"}],
        }
        file = self.work / "kubelet.yaml"
        file.write_text(yaml.safe_dump(config))
        kubeconfig = self.cluster.plane.node(self.name).kubeconfig(self.work / "kubelet.kubeconfig")
        kubelet = self.start(
            "kubelet", self.cluster.tools / "kubelet", "--config", file, "--kubeconfig", kubeconfig,
            "--root-dir", self.kubelet, "--cert-dir", self.work / "pki", "--hostname-override", self.name,
            "--node-ip", ADDRESS, "--v=2",
        )

        def ready():
            if kubelet.poll() is not None:
                raise RuntimeError(f"kubelet has ended with {kubelet.returncode}")
            node = self.cluster.plane.admin.get(f"/api/v1/nodes/{self.name}")
            conditions = {each["type"]: each["status"] for each in node["status"].get("conditions", [])}
            # Without a network plugin it is never ready, which pods of the host's network do not need.
            return "Ready" in conditions

        eventually("kubelet registers the node", ready, seconds=90, pause=0.2)

    def log_folder(self, pod, container):
        about = pod["metadata"]
        return self.logs / f"{about['namespace']}_{about['name']}_{about['uid']}" / container

    def container_made(self, pod, container="main"):
        """When its log was made, which is when it was."""
        return self.log_folder(pod, container).stat().st_mtime

    def output(self, pod, container="main"):
        """The lines that a container of a pod has printed."""
        folder = self.log_folder(pod, container)
        lines = [line for file in sorted(folder.glob("*.log")) for line in file.read_text().splitlines()]
        # <time> <stream> <F or P> <text>
        return [line.split(" ", 3)[3] for line in lines]

    def mounted(self):
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        targets = (line.split()[4] for line in lines)
        return [target for target in targets if target.startswith(f"{self.kubelet}/pods/") and "csi" in target]


def cgroups():
    """All control groups there are."""
    return {Path(folder) for folder, _, _ in os.walk(CGROUPS)}


def remove_cgroups(folders):
    for folder in sorted(folders, reverse=True):
        # What is in use stays.
        with contextlib.suppress(OSError):
            folder.rmdir()


def libraries(program):
    """The shared libraries of a program, by the paths it looks for them at."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    words = (word for line in done.stdout.splitlines() for word in line.split())
    return {Path(word) for word in words if word.startswith("/")}


def write_image(file, name, files, entrypoint):
    """An image with nothing but these files, by their paths, and the libraries that the programs among them need."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        needed = {library for program in files.values() for library in libraries(program)}
        for path, source in [*files.items(), *((str(path)[1:], path) for path in sorted(needed))]:
            content = stripped(source)
            about = tarfile.TarInfo(path)
            about.mode, about.size = 0o755, len(content)
            archive.addfile(about, io.BytesIO(content))
    blobs = {}

    def blob(content, kind):
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    packed = blob(layer.getvalue(), "layer.v1.tar")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    config = {"architecture": machine, "os": "linux", "config": {"Entrypoint": entrypoint},
              "rootfs": {"type": "layers", "diff_ids": [packed["digest"]]}}
    about = blob(json.dumps(config).encode(), "config.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": about, "layers": [packed]}
    listed = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    listed["annotations"] = {"io.containerd.image.name": name}
    blobs["oci-layout"] = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode()
    with tarfile.open(file, "w") as archive:
        for path, content in blobs.items():
            about = tarfile.TarInfo(path)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def stripped(program):
    """A program without what only debuggers read: that is most of what a build for tests makes."""
    with tempfile.TemporaryDirectory() as folder:
        smaller = Path(folder) / "smaller"
        if shutil.which("objcopy"):
            subprocess.run(["objcopy", "--strip-debug", program, smaller], capture_output=True, check=False)
        # What is no program stays as it is.
        return (smaller if smaller.exists() else Path(program)).read_bytes()
