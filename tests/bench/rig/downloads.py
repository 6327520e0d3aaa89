"""The download cases: a model from S3 or the Hub, by all contenders in turn, next to the ceilings."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import contenders, measure, profile
from .origin import BUCKET, Origin

SMALL_FILES = 5000
CEILING_CONNECTIONS = 16


@dataclass
class Case:
    name: str
    what: str
    source: str
    # 0: the small files.
    shards: int


CASES = [
    Case("shards", "8 shards over S3", "s3", 8),
    Case("hub", "8 shards over the stand-in Hub", "hub", 8),
    Case("file", "one file over S3", "s3", 1),
    Case("small", f"{SMALL_FILES} small files over S3", "s3", 0),
]


class Rig:
    """What all cases share: options, tools, directories."""

    def __init__(self, options, tools, work, data):
        self.options, self.tools, self.work, self.data = options, tools, work, data
        self.home, self.number = work / "home", 0
        self.home.mkdir(parents=True)
        # ext4 seeks long for an inode in a block group where many were freed in the last minutes: each run gets
        # a directory in another group. Elsewhere there is no such flag, and no such search.
        subprocess.run(["chattr", "+T", work], capture_output=True)

    @property
    def out(self):
        """Where the run that is under way may write."""
        return self.work / f"out-{self.number:03}"

    def helper(self, *arguments):
        """One measurement by `weightd-bench`."""
        command = [self.tools["weightd"] / "weightd-bench", *map(str, arguments)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(result.stdout)

    def environment(self, *parts):
        own = {"HOME": str(self.home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        for part in parts:
            own |= part
        return own

    def log(self, text):
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def clear(self):
        measure.remove(self.out)
        self.number += 1
        shutil.rmtree(self.home)
        self.home.mkdir()


def write_model(rig, case):
    """The model of a case in memory, and the SHA-256 of its files."""
    root = rig.data / BUCKET
    shutil.rmtree(root, ignore_errors=True)
    total = int(rig.options.gigabytes * measure.GIGABYTE)
    if case.shards:
        rig.helper("generate", "--shards", case.shards, "--bytes-per-shard", total // case.shards, root)
    else:
        write_small_files(root)
    return measure.digests(root)


def write_small_files(root):
    """From 1 to 128 KiB, most of them small, in 50 directories."""
    for number in range(SMALL_FILES):
        path = root / f"part-{number % 50:02}" / f"{number:05}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(1024 << (number * 7919 % 8)))


def download(rig, case, contender, origin, expected, **where):
    """One run of one contender: timed, synced, checked, removed."""
    measure.settle(rig.work, rig.options.fill)
    rig.out.mkdir()
    environment = rig.environment(origin.environment(**where), contender.environment)
    job = contenders.Job(rig.out, rig.home, environment, origin.urls(**where), rig.tools)
    try:
        figures, stdout = measure.execute(contender.command(job), environment, rig.work / f"{contender.name}.log")
        figures["sync_seconds"] = measure.sync(rig.out)
        tree = rig.out if contender.name != "weightd" else Path(json.loads(stdout)["path"])
        figures |= accept(tree, expected)
    finally:
        rig.clear()
    gigabytes = figures["bytes"] / measure.GIGABYTE
    figures["total_seconds"] = figures["seconds"] + figures["sync_seconds"]
    figures["cpu_seconds_per_gigabyte"] = figures["cpu_seconds"] / gigabytes
    return figures


def accept(tree, expected):
    """Every byte must be there; and how much of it a loader finds in memory."""
    paths = [tree / name for name in expected]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise measure.RunError(f"{len(missing)} files are missing, such as {missing[0]}")
    warm = measure.resident(paths)
    found = measure.digests(tree)
    wrong = [name for name, sha256 in expected.items() if found[name] != sha256]
    if wrong:
        raise measure.RunError(f"{len(wrong)} files have other bytes, such as {wrong[0]}")
    return {"bytes": sum(path.stat().st_size for path in paths), "resident": warm}


def ceilings(rig, case, origin, total):
    """What the machine can do at best with as many bytes: sockets, disk, hash."""
    measure.settle(rig.work, rig.options.fill)
    received = rig.helper("receive", "--connections", CEILING_CONNECTIONS, *origin.urls().values())
    written = rig.helper("write", "--bytes", total, rig.work)
    os.sync()
    hashed = rig.helper("hash")
    cores = "one_core" if case.shards == 1 else "all_cores"
    rate = hashed["gigabytes_per_second"]["sha2"][cores]
    return {
        "net_seconds": received["seconds"],
        "disk_seconds": written["seconds"],
        "sha_seconds": total / measure.GIGABYTE / rate,
        "sha_gigabytes_per_second": hashed["gigabytes_per_second"],
    }


def profiled(rig, competing, origin, total):
    """Where the processor time of each contender goes that is a program of its own."""
    texts = {}
    for contender in competing:
        measure.settle(rig.work, rig.options.fill)
        rig.out.mkdir()
        environment = rig.environment(origin.environment(), contender.environment)
        job = contenders.Job(rig.out, rig.home, environment, origin.urls(), rig.tools)
        try:
            samples = profile.record(contender.command(job), environment, rig.work)
            texts[contender.name] = profile.summarise(samples, total / measure.GIGABYTE)
        finally:
            rig.clear()
    return texts


def chosen(rig, case):
    """Contenders of a case, those that were asked for."""
    wanted = rig.options.contenders
    found = [each for each in contenders.contenders() if case.source in each.sources]
    return [each for each in found if wanted is None or each.name in wanted]


def run(rig, case):
    """All rounds of a case. The order changes by round, so that nobody always follows the same one."""
    competing, failed = chosen(rig, case), {}
    expected = write_model(rig, case)
    total = sum(path.stat().st_size for path in (rig.data / BUCKET).rglob("*") if path.is_file())
    runs, at_best = {each.name: [] for each in competing}, []
    with Origin(rig.tools["nginx"], rig.tools["weightd"], rig.work, rig.data) as origin:
        for number in range(rig.options.rounds):
            turn = number % max(len(competing), 1)
            order = competing[turn:] + competing[:turn]
            at_best.append(ceilings(rig, case, origin, total))
            for contender in order:
                if contender.name in failed:
                    continue
                try:
                    figures = download(rig, case, contender, origin, expected)
                except measure.RunError as error:
                    failed[contender.name] = str(error).strip()
                    rig.log(f"{case.name}: {contender.name} is out: {error}".strip())
                    continue
                runs[contender.name].append(figures)
                rig.log(
                    f"{case.name}, round {number + 1}: {contender.name} {figures['seconds']:.2f} s"
                    f" + {figures['sync_seconds']:.2f} s, {figures['cpu_seconds_per_gigabyte']:.2f} CPU s/GB,"
                    f" {figures['peak_rss_mebibytes']:.0f} MiB, {figures['resident']:.0%} in memory"
                )
        profiles = profiled(rig, competing, origin, total) if rig.options.profile else None
    return {
        "what": case.what,
        "bytes": total,
        "files": len(expected),
        "profile": profiles,
        "verifies": [each.name for each in competing if each.verifies],
        "runs": {name: figures for name, figures in runs.items() if figures},
        "failed": failed,
        "ceilings": at_best,
    }
