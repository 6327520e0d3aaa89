"""The origin, the nodes, the shared directory as each node sees it, and what is checked of them afterwards."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hosts.disk import Disk
from hosts.network import MB, ORIGIN, Network

REPO = "org/model"
PASSTHROUGH = Path(__file__).with_name("passthrough.py")
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), Path("libfaketime.so.1"))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(root):
    """sha256 by path of every file under a directory."""
    paths = [path for path in sorted(Path(root).rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip((str(path.relative_to(root)) for path in paths), pool.map(digest, paths)))


class Tier:
    """The shared directory on one host, through a mount of its own."""

    def __init__(self, host, source, target, settings):
        self.host, self.target = host, target
        command = [sys.executable, PASSTHROUGH, source, target]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server, self.lock = host.start(*command, **pipes), threading.Lock()
        if not self.server.stdout.readline():
            raise RuntimeError(f"{host.name}: the shared directory is not mounted")
        self.order(**settings)

    def order(self, **order):
        with self.lock:
            self.server.stdin.write(json.dumps(order) + "\n")
            self.server.stdin.flush()
            return json.loads(self.server.stdout.readline())

    def abort(self):
        """Every call fails from now on, as when a client was evicted; the mount point stays."""
        self.order(abort=True)
        self.server.wait()

    def unmount(self):
        """Off the tree at once, while open files stay usable: `umount --lazy`."""
        self.host.run("umount", "--lazy", self.target)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.server.stdin.close()
        try:
            self.server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        self.server.stdout.close()


class Fetch:
    """One `weightctl prefetch` on a host."""

    def __init__(self, node, arguments, environment):
        self.node, self.ended, self.seconds = node, None, None
        self.started = time.monotonic()
        self.output = open(node.work / f"fetch-{time.monotonic_ns()}.out", "w+")
        self.errors = open(f"{self.output.name[:-3]}err", "w+")
        program = [node.cluster.binaries / "weightctl", *arguments, "prefetch", f"hf://{REPO}", "--output", "json"]
        files = {"stdout": self.output, "stderr": self.errors, "stdin": subprocess.DEVNULL}
        self.process = node.host.start(*program, env=environment, **files)
        self.waiter = threading.Thread(target=self.await_end, daemon=True)
        self.waiter.start()

    def await_end(self):
        """`seconds` last until the result is told: what it writes to the shared tier behind is not its user's wait."""
        while self.seconds is None:
            ended = self.process.poll() is not None
            if ended or self.result():
                self.seconds = time.monotonic() - self.started
            time.sleep(0.01)
        self.process.wait()

    def wait(self):
        """Its exit status; None if it hangs, in which case it is killed. 0 if it has told its result, and only
        waits for a shared directory that does not answer: such a process cannot end."""
        self.waiter.join(max(0, self.started + self.node.cluster.options.patience - time.monotonic()))
        if not self.waiter.is_alive():
            return self.process.returncode
        if self.seconds is not None:
            return 0
        self.kill()
        self.waiter.join(10)
        return None

    def running(self):
        return self.process.poll() is None

    def signal(self, number):
        if self.running():
            os.kill(self.process.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)

    def result(self):
        self.output.seek(0)
        lines = [line for line in self.output.read().splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}

    def said(self, last=2000):
        self.errors.seek(0)
        return self.errors.read()[-last:]

    def close(self):
        self.kill()
        self.waiter.join(10)
        self.output.close()
        self.errors.close()


class Node:
    def __init__(self, cluster, number, clock_s=0):
        self.cluster, self.number, self.clock_s = cluster, number, clock_s
        self.host = cluster.network.add(f"node{number}", f"10.77.1.{number}")
        self.work = cluster.work / self.host.name
        self.root, self.tier, self.fetches, self.daemon = self.work / "root", None, [], None
        self.work.mkdir()
        cluster.network.limit(self.host, cluster.options.rate, cluster.options.delay_ms)
        if cluster.disk:
            self.mount()

    def mount(self):
        rate = self.cluster.tier_rate * MB if self.cluster.tier_rate else None
        settings = {"read_rate": rate, "write_rate": rate, "skew": self.clock_s}
        settings["latency"] = self.cluster.options.tier_latency_ms / 1000
        self.tier = Tier(self.host, self.cluster.disk.mount, self.cluster.shared, settings)

    def remount(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            self.host.run("umount", "--lazy", self.cluster.shared)
        self.tier.close()
        self.mount()

    def environment(self, **more):
        own = {"HF_ENDPOINT": self.cluster.endpoint, "HOME": str(self.work), "AWS_EC2_METADATA_DISABLED": "true"}
        own["PATH"] = os.environ["PATH"]
        if self.clock_s:
            # CLOCK_REALTIME of the program only: durations are measured right on a host with a wrong clock.
            own |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"{self.clock_s:+d}s"}
            own |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
        return own | more

    def fetch(self, shared=True, root=None, **more):
        """Starts a prefetch. `more` are variables of its environment, `WEIGHTD_SHARED_…` without that prefix."""
        arguments = ["--root", root or self.root, *(["-v"] * self.cluster.options.verbose)]
        variables = self.cluster.shared_settings() | more if shared else {}
        variables = {f"WEIGHTD_SHARED_{name}": str(value) for name, value in variables.items()}
        one = Fetch(self, arguments, self.environment(**variables))
        self.fetches.append(one)
        return one

    def start_daemon(self, **settings):
        """`settings` are keys of the section `[shared]`."""
        lines = [f"root = {json.dumps(str(self.root))}", f"socket = {json.dumps(str(self.work / 'weightd.sock'))}"]
        if settings:
            lines += ["[shared]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
        config = self.work / "weightd.toml"
        config.write_text("\n".join(lines) + "\n")
        self.daemon_log = open(self.work / "weightd.err", "a+")
        program = [self.cluster.binaries / "weightd", "--config", config]
        files = {"stderr": self.daemon_log, "stdin": subprocess.DEVNULL}
        self.daemon = self.host.start(*program, env=self.environment(), **files)
        deadline = time.monotonic() + 30
        while not self.ctl("status")[1]:
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.host.name}: weightd does not answer: {self.daemon_said()}")
            time.sleep(0.05)

    def daemon_said(self):
        self.daemon_log.seek(0)
        return self.daemon_log.read()[-2000:]

    def ctl(self, *arguments):
        """A command to the daemon: exit status, and what it printed as JSON."""
        program = [self.cluster.binaries / "weightctl", "--socket", self.work / "weightd.sock", "--output", "json"]
        command = self.host.within(*program, *arguments)
        own = {"env": self.environment(), "timeout": self.cluster.options.patience}
        done = subprocess.run(command, capture_output=True, text=True, **own)
        lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "["))]
        return done.returncode, json.loads(lines[-1]) if lines else None

    def partition(self, apart):
        self.cluster.network.link(self.host, up=not apart)

    def trees(self):
        return list(self.root.glob("snapshots/*/tree"))

    def wrong(self, root=None):
        """What is not right about the node's tree; None if all is."""
        trees = list((root or self.root).glob("snapshots/*/tree"))
        if len(trees) != 1:
            return f"{self.host.name}: {len(trees)} trees"
        expected, found = self.cluster.origin.digests, digests(trees[0])
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        return f"{self.host.name}: {len(names)} wrong files, such as {names[0]}" if names else None

    def close(self):
        for fetch in self.fetches:
            fetch.close()
        if self.daemon:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon_log.close()
        if self.tier:
            # A thread in a call that is not answered cannot go: answer it first.
            with contextlib.suppress(Exception):
                self.tier.order(stall=False, stall_writes=False)
            self.tier.close()


class Origin:
    """A generated model, and the stand-in Hub that serves it. The files outlive clusters, the Hub does not."""

    def __init__(self, binaries, work, options):
        self.binaries, self.files = binaries, work / "model"
        command = [binaries / "weightd-standin", "generate", "--root", self.files, "--shards", str(options.shards)]
        command += ["--bytes-per-shard", str(options.shard_mb * MB)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.digests = digests(self.files)
        self.size = sum(path.stat().st_size for path in self.files.iterdir())

    def start(self, host):
        command = [self.binaries / "weightd-standin", "hub", f"--repo={REPO}={self.files}", f"--listen={ORIGIN}:0"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        hub = host.start(*command, **pipes)
        line = hub.stdout.readline()
        if not line:
            raise RuntimeError("the stand-in does not start")
        return hub, json.loads(line)["endpoint"]


class Cluster:
    """Origin, hosts and shared directory, new for each scenario. `with` tears it all down."""

    def __init__(self, rig, nodes=8, shared=True, tier_rate=None, clocks=(), disk_mb=None):
        self.options, self.binaries, self.origin = rig.options, rig.binaries, rig.origin
        self.work = rig.work / "cluster"
        self.shared, self.disk = self.work / "shared", None
        self.tier_rate = tier_rate or rig.options.tier_rate
        self.plan = nodes, shared, clocks, disk_mb
        self.nodes, self.undo = [], contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, self.work, ignore_errors=True)
            self.shared.mkdir(parents=True)
            self.start(undo)
            self.undo = undo.pop_all()
        return self

    def start(self, undo):
        nodes, shared, clocks, disk_mb = self.plan
        if shared:
            # What is kept, what is set aside when damaged, and what the file system itself needs.
            size = disk_mb * MB if disk_mb else self.origin.size * 5 // 2 + 128 * MB
            self.disk = Disk(self.work, size)
            undo.callback(self.disk.close)
        self.network = Network()
        undo.callback(self.network.close)
        host = self.network.add_origin()
        self.network.limit(host, self.options.bottleneck)
        self.hub, self.endpoint = self.origin.start(host)
        undo.callback(self.stop_hub)
        for number in range(1, nodes + 1):
            node = Node(self, number, clocks[number - 1] if clocks else 0)
            self.nodes.append(node)
            undo.callback(node.close)

    def __exit__(self, *_):
        if self.disk:
            self.disk.thaw()
        self.undo.close()

    def stop_hub(self):
        self.hub.kill()
        self.hub.wait()
        self.hub.stdin.close()
        self.hub.stdout.close()

    def shared_settings(self):
        if not self.disk:
            return {}
        settings = {"ROOT": self.shared, "SEGMENT": self.options.segment}
        return settings | {"CLAIM_TIMEOUT": f"{self.options.claim_timeout}s"}

    def freeze(self):
        """Freezes the disk. Whoever writes waits in front of it, where he can be killed as on a network file system."""
        for node in self.nodes:
            node.tier.order(stall_writes=True)
        self.disk.freeze()

    # What the origin sent

    def requests(self):
        with urllib.request.urlopen(f"{self.endpoint}/_standin/requests", timeout=30) as answer:
            return json.load(answer)

    def forget_requests(self):
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/_standin/requests", method="DELETE"))
        self.wire_before = self.network.received(self.network.hosts["origin"])

    def egress(self):
        """Bytes of files that the origin sent, by its own log, and all bytes on its link."""
        wire = self.network.received(self.network.hosts["origin"]) - getattr(self, "wire_before", 0)
        files = [one for one in self.requests() if one["status"] in (200, 206) and one["method"] == "GET"]
        sent = sum(one["bytes_sent"] for one in files if not one["path"].startswith("/api/models/"))
        ratios = {"egress_ratio": round(sent / self.origin.size, 3), "wire_ratio": round(wire / self.origin.size, 3)}
        return {"egress": sent, **ratios}

    # The shared directory, as it is on the disk

    def claims(self):
        return sorted(path.name for path in (self.disk.mount / "blobs").glob("*/*.claim"))

    def landed(self):
        """Segments that are on the shared disk, as paths of `part` or `blob` and of what vouches for the segment."""
        found = []
        for sums in sorted((self.disk.mount / "blobs").glob("*/*.sums")):
            whole = [sums.with_name(name) for name in ("blob", "part") if sums.with_name(name).exists()]
            if ".aside." not in sums.parent.name and whole:
                found.append((whole[0], sums))
        return found

    def wrong_shared(self):
        """Whole blobs in the shared directory that are not a file of the model."""
        expected, wrong, count = set(self.origin.digests.values()), [], 0
        for blob in sorted((self.disk.mount / "blobs").glob("*/blob")):
            if ".aside." in blob.parent.name:
                continue
            count += 1
            found = digest(blob)
            if found not in expected:
                wrong.append(blob.parent.name)
        return count, wrong

    def tier_rates(self, mb=16):
        """MB/s at which all nodes at once read one file of the shared directory, each on its own mount."""
        probe = self.disk.mount / "probe"
        probe.write_bytes(os.urandom(mb * MB))
        command = ["dd", f"if={self.shared / 'probe'}", "of=/dev/null", "bs=1M"]
        begin = time.monotonic()
        readers = [node.host.start(*command, stderr=subprocess.DEVNULL) for node in self.nodes]
        failed = [reader.wait() for reader in readers]
        seconds = time.monotonic() - begin
        probe.unlink()
        if any(failed):
            raise RuntimeError("the shared directory cannot be read")
        return mb / seconds
