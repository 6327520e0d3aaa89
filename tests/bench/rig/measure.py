"""One run: the clock, the processor time and memory of all its processes, and what is on disk afterwards."""

import hashlib
import os
import select
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SAMPLE_SECONDS = 0.03
GIGABYTE = 1e9
# What the page cache is not filled with before a run: less, and the kernel reclaims as the fill goes on.
SPARE_BYTES = 768 << 20


class RunError(Exception):
    """A contender failed, or brought other bytes than it should."""


def children(pid):
    """Processes that a process has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in children(child)]


def memory(pid, field):
    """`VmRSS` or `VmHWM` of a process, in bytes."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def peak_so_far(pid):
    """The most that the processes of a tree have together, or one of them alone had in between."""
    tree = [pid, *children(pid)]
    return max(sum(memory(each, "VmRSS") for each in tree), *(memory(each, "VmHWM") for each in tree))


def execute(command, environment, log):
    """Runs a command to its end: seconds, processor seconds and peak memory of its processes, its stdout."""
    with open(log, "w+b") as errors, open(f"{log}.out", "w+b") as output:
        begun = time.monotonic()
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": errors}
        process = subprocess.Popen([str(part) for part in command], env=environment, **streams)
        try:
            peak = watch(process.pid)
        except BaseException:
            process.kill()
            raise
        seconds = time.monotonic() - begun
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        stdout = output.read().decode(errors="replace")
        if process.returncode:
            errors.seek(0)
            text = errors.read().decode(errors="replace")[-2000:]
            raise RunError(f"{command[0]} ended with {process.returncode}: {text or stdout[-2000:]}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "user_seconds": usage.ru_utime,
        "peak_rss_mebibytes": peak / (1 << 20),
    }, stdout


def watch(pid):
    """Waits until a process ends, and returns the most memory that its tree had."""
    ended, peak = os.pidfd_open(pid), 0
    try:
        while not select.select([ended], [], [], SAMPLE_SECONDS)[0]:
            peak = max(peak, peak_so_far(pid))
    finally:
        os.close(ended)
    return peak


def sync(folder):
    """Makes everything on a file system durable, as `sync -f` does; returns the seconds it took."""
    begun = time.monotonic()
    subprocess.run(["sync", "--file-system", folder], check=True)
    return time.monotonic() - begun


def resident(paths):
    """How much of some files is in the page cache, from 0 to 1."""
    sizes = sum(path.stat().st_size for path in paths)
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Pages, of which the last of a file is not full.
    return min(1.0, sum(map(int, listed.split())) / max(sizes, 1))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(root):
    """SHA-256 of all files below a directory, by path, without those of hidden directories."""
    paths = [path for path in Path(root).rglob("*") if path.is_file()]
    paths = {str(path.relative_to(root)): path for path in paths}
    paths = {name: path for name, path in paths.items() if not name.startswith(".")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(digest, paths.values())))


def settle(folder, fill=True):
    """Before a run: nothing left to write, and no memory free that the host would first have to give."""
    os.sync()
    if fill:
        fill_page_cache(folder)
    time.sleep(0.3)


def fill_page_cache(folder):
    """A virtual machine may give free memory back to its host, and pays as it touches it again."""
    free = available("MemFree") - SPARE_BYTES
    if free <= 0:
        return
    sparse = Path(folder) / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(free)
    with open(sparse, "rb", buffering=0) as file:
        buffer = bytearray(4 << 20)
        while file.readinto(buffer):
            pass
    # It stays until the next run: what is deleted is free memory again.


def available(field):
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise KeyError(field)


def remove(folder):
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
