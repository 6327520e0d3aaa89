"""What a node pays for a store that is full: start, memory, listings; and what a pod pays to read through its mount."""

import contextlib
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path

from . import measure
from .scaling import Daemon

SNAPSHOTS, FILES = 1000, 20
BLOCK_BYTES = 16 << 20
# What a start leaves to do is done after the first; then the daemon is idle.
SETTLE_SECONDS, IDLE_SECONDS = 2, 5


def prefetch(rig, *folders):
    """Brings directories into the store of this run as models."""
    models = [f"file://{folder}" for folder in folders]
    command = [rig.tools["weightd"] / "weightctl", "--root", rig.out / "store", "prefetch", *models, "--include", "*"]
    return measure.execute(command, rig.environment(), rig.work / "weightctl.log")[0]


def fill(rig):
    """A store with as many snapshots and blobs as a node that has seen everything, through the product itself."""
    source = rig.data / "many"
    folders = [source / f"model-{number:04}" for number in range(rig.options.snapshots)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        for file in range(FILES):
            (folder / f"{file:02}.json").write_text(f'{{"model": {number}, "file": {file}}}')
    begun = time.monotonic()
    for at in range(0, len(folders), 100):
        prefetch(rig, *folders[at:at + 100])
    shutil.rmtree(source)
    return time.monotonic() - begun


def startup(rig):
    """Start until the first answer; memory then; `ls` and `status`; the processor while idle."""
    rig.out.mkdir()
    filled = fill(rig)
    rig.log(f"startup: {rig.options.snapshots} snapshots made in {filled:.0f} s")
    runs = []
    try:
        for _ in range(rig.options.rounds):
            runs.append(start_once(rig))
    finally:
        rig.clear()
    blobs = rig.options.snapshots * FILES
    return {"what": f"a store of {rig.options.snapshots} snapshots, {blobs} blobs", "fill_seconds": filled, "runs": {"weightd": runs}}


def start_once(rig):
    weightctl = [rig.tools["weightd"] / "weightctl", "--output", "json"]
    begun = time.monotonic()
    with Daemon(rig, rig.environment(), lambda *command: command, "") as daemon:
        asked = [*weightctl, "--socket", daemon.socket]
        first, _ = measure.execute([*asked, "status"], rig.environment(), rig.work / "status.log")
        started = time.monotonic() - begun
        memory = measure.memory(daemon.process.pid, "VmRSS") / (1 << 20)
        status, _ = measure.execute([*asked, "status"], rig.environment(), rig.work / "status.log")
        listed, _ = measure.execute([*asked, "ls"], rig.environment(), rig.work / "ls.log")
        time.sleep(SETTLE_SECONDS)
        before = daemon.cpu_seconds()
        time.sleep(IDLE_SECONDS)
        figures = {
            "seconds": started,
            "rss_mebibytes": memory,
            "peak_rss_mebibytes": daemon.peak_rss(),
            "status_seconds": status["seconds"],
            "ls_seconds": listed["seconds"],
            "idle_cpu_percent": (daemon.cpu_seconds() - before) / IDLE_SECONDS * 100,
        }
    rig.log(f"startup: {started:.3f} s, {memory:.0f} MiB, ls {figures['ls_seconds']:.3f} s")
    return figures


def read_plain(path, buffer):
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_mapped(path, buffer):
    """As a loader does: the file's pages, copied to where the tensors are wanted."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        target = memoryview(buffer)
        with memoryview(pages) as source:
            for at in range(0, len(source), len(buffer)):
                part = source[at:at + len(buffer)]
                target[:len(part)] = part
                part.release()


def forget(path):
    """Takes a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(rig):
    """A published file by its name in the store, and through a read-only bind mount as the plugin makes it."""
    rig.out.mkdir()
    folder, target = rig.data / "one", rig.work / "mount"
    folder.mkdir(parents=True)
    target.mkdir()
    bytes_read = int(rig.options.gigabytes * measure.GIGABYTE / 2)
    with contextlib.ExitStack() as undo:
        undo.callback(rig.clear)
        rig.helper("generate", "--shards", 1, "--bytes-per-shard", bytes_read, folder)
        prefetch(rig, folder)
        shutil.rmtree(folder)
        (plain,) = Path(rig.out).glob("store/snapshots/*/tree/model.safetensors")
        subprocess.run(["mount", "--bind", plain.parent, target], check=True)
        undo.callback(subprocess.run, ["umount", target], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro,nosuid,nodev,noexec", target], check=True)
        paths = {"plain": plain, "mount": target / plain.name}
        runs = {f"{way}-{heat}-{place}": [] for way in WAYS for heat in HEATS for place in paths}
        for number in range(rig.options.rounds * 2):
            # The two places of one way follow each other, in turns: their ratio is taken in pairs.
            for key in sorted(runs, reverse=number % 2 == 1):
                runs[key].append({"seconds": read_once(key, paths)})
    return {"what": f"{bytes_read / 1e9:.1f} GB read, the store's file and through a mount", "bytes": bytes_read, "runs": runs}


WAYS = {"read": read_plain, "mmap": read_mapped}
HEATS = ("warm", "cold")


def read_once(key, paths):
    way, heat, place = key.split("-")
    buffer = bytearray(BLOCK_BYTES)
    if heat == "cold":
        forget(paths[place])
    else:
        read_plain(paths[place], buffer)
    begun = time.monotonic()
    WAYS[way](paths[place], buffer)
    return time.monotonic() - begun
