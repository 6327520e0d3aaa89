"""Connection scaling: a link with a round trip, and an origin that gives each response only so much, as S3 does."""

import contextlib
import json
import os
import shutil
import subprocess
import time

from . import measure
from .downloads import Case, write_model
from .link import HERE, Link
from .origin import BUCKET, SLOW, Origin, stop

CONNECTIONS = (1, 8, 32, 64)
CASE = Case("link", "8 shards over S3, 2 Gbit/s, 20 ms, 25 MB/s a response", "s3", 8)
BITS_PER_SECOND, ROUND_TRIP_SECONDS, RESPONSE_BYTES_PER_SECOND = 2_000_000_000, 0.02, 25_000_000
# More would only take longer.
MOST_GIGABYTES = 0.5
PART_BYTES = 8 << 20


class Daemon:
    """`weightd` on an empty store, with so many connections; its processor time and memory are the fetch's."""

    def __init__(self, rig, environment, within, config):
        self.store, self.socket = rig.out / "store", rig.work / "d.sock"
        rig.out.mkdir(exist_ok=True)
        path = rig.work / "weightd.toml"
        own = f"root = {json.dumps(str(self.store))}\nsocket = {json.dumps(str(self.socket))}\n"
        path.write_text(own + config)
        command = within(rig.tools["weightd"] / "weightd", "--config", path)
        with open(rig.work / "weightd.log", "w") as log:
            self.process = subprocess.Popen([str(part) for part in command], env=environment, stderr=log)

    def __enter__(self):
        deadline = time.monotonic() + 30
        while not self.socket.is_socket():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise measure.RunError("weightd does not listen")
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        stop(self.process)

    def cpu_seconds(self):
        fields = open(f"/proc/{self.process.pid}/stat").read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_rss(self):
        return measure.memory(self.process.pid, "VmHWM") / (1 << 20)


def ours(rig, link, environment, connections):
    with Daemon(rig, environment, link.within, f"[fetch]\nconnections = {connections}\n") as daemon:
        weightctl = [rig.tools["weightd"] / "weightctl", "--socket", daemon.socket]
        command = [*weightctl, "--output", "json", "prefetch", f"s3://{BUCKET}/model", "--include", "*"]
        figures, _ = measure.execute(command, environment, rig.work / "weightctl.log")
        figures["cpu_seconds"] += daemon.cpu_seconds()
        figures["peak_rss_mebibytes"] = daemon.peak_rss()
    return figures


def s5cmd(rig, link, environment, connections):
    """As many parts of one file at once, and as many files as that leaves room for."""
    rig.out.mkdir()
    parts = min(connections, 8)
    endpoint = ["--endpoint-url", environment["AWS_ENDPOINT_URL_S3"]]
    start = [rig.tools["s5cmd"], *endpoint, "--log", "error", "--numworkers", connections // parts]
    options = ["--concurrency", parts, "--part-size", PART_BYTES >> 20]
    command = link.within(*start, "cp", *options, f"s3://{BUCKET}/model/*", f"{rig.out}/")
    return measure.execute(command, environment, rig.work / "s5cmd.log")[0]


def ceiling(rig, link, environment, connections):
    urls = rig.origin.urls(HERE, SLOW).values()
    arguments = ["receive", "--connections", connections, "--part", PART_BYTES, *urls]
    command = link.within(rig.tools["weightd"] / "weightd-bench", *arguments)
    figures, stdout = measure.execute(command, environment, rig.work / "receive.log")
    # Its own clock starts after it has asked how long each file is.
    return {**figures, "seconds": json.loads(stdout)["seconds"]}


def run(rig):
    competing = {"weightd": ours, "s5cmd": s5cmd, "ceiling": ceiling}
    wanted = rig.options.contenders
    competing = {name: way for name, way in competing.items() if wanted is None or name in (*wanted, "ceiling")}
    all_gigabytes, rig.options.gigabytes = rig.options.gigabytes, min(rig.options.gigabytes, MOST_GIGABYTES)
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, rig.options, "gigabytes", all_gigabytes)
        write_model(rig, CASE)
        total = sum(path.stat().st_size for path in (rig.data / BUCKET).rglob("*") if path.is_file())
        binaries = rig.tools["weightd"]
        origin = Origin(rig.tools["nginx"], binaries, rig.work, rig.data, RESPONSE_BYTES_PER_SECOND)
        rig.origin = undo.enter_context(origin)
        link = undo.enter_context(Link(BITS_PER_SECOND, ROUND_TRIP_SECONDS))
        environment = rig.environment(origin.environment(HERE, SLOW))
        runs = {f"{name}@{connections}": [] for name in competing for connections in CONNECTIONS}
        for number in range(rig.options.rounds):
            for connections in CONNECTIONS:
                for name, way in competing.items():
                    figures = one(rig, way, link, environment, connections)
                    figures["cpu_seconds_per_gigabyte"] = figures["cpu_seconds"] * measure.GIGABYTE / total
                    runs[f"{name}@{connections}"].append(figures)
                    rate = total / 1e6 / figures["seconds"]
                    rig.log(f"link, round {number + 1}: {name}, {connections} connections: {rate:.0f} MB/s,"
                            f" {figures['peak_rss_mebibytes']:.0f} MiB")
    return {"what": CASE.what, "bytes": total, "runs": runs}


def one(rig, way, link, environment, connections):
    measure.settle(rig.work, fill=False)
    try:
        figures = way(rig, link, environment, connections)
    finally:
        rig.clear()
    figures["total_seconds"] = figures["seconds"]
    return figures
