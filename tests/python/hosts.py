"""Proves that nodes with a shared tier share, and that no trouble of one or of the tier is another's.

    python hosts.py DIRECTORY-OF-THE-PROGRAMS [SCENARIO…]

Needs root, a kernel with FUSE, loop devices and ext4, and iproute2, util-linux and e2fsprogs. Without a name every
scenario runs that the programs can do. Each prints one line of JSON with its figures; exits with 1 if any failed.

Every node is a host of its own: network, mount and UTS namespace, a link to a bridge with a rate (`tc tbf`; MB are
10^6 bytes; a delay where the kernel has netem), and its own mount of the shared directory. That is an ext4 file
system on a loop device on a sparse file, which each node sees through a FUSE file system (`hosts/passthrough.py`)
that caches nothing, so that one node sees at once what another wrote, as on Lustre, and every byte read or written
counts against the node's rate for the shared tier. blkio throttles of cgroups are not used: they pass over what is
in the page cache, which all hosts of one machine share, and over buffered writes. NFS is not used: a kernel that has
a client is not a given.

A node's clock (`clocks`) is moved by libfaketime (Debian: `libfaketime`): it moves CLOCK_REALTIME as the programs
read it, thus log times, expiry and the file times that they set themselves. Durations (CLOCK_MONOTONIC) and the
origin stay as they are. Times that the file system sets when a node writes to the shared directory are moved as
much, as by a Lustre client. Time namespaces cannot do that: they move CLOCK_MONOTONIC and CLOCK_BOOTTIME only.

All of it happens in mount, network and process namespaces of this program's own, so nothing has a name outside
but a directory below target/ with this process's id, and nothing but that is left even if it is killed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hosts.cluster import Origin
from hosts.network import MB
from hosts.scenarios import PLAIN, SHARED

INNER = "HOSTS_PY_WORK"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", type=Path, help="directory of weightd, weightctl and weightd-standin")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=", ".join([*PLAIN, *SHARED]))
    add = parser.add_argument
    add("--rate", type=float, default=12, help="MB/s from the origin to one node (%(default)s)")
    add("--bottleneck", type=float, help="MB/s that leave the origin (unlimited)")
    add("--delay-ms", type=int, default=0, help="of each node's link; needs netem")
    add("--tier-rate", type=float, default=50, help="MB/s, read and written each, of one node's mount (%(default)s)")
    add("--tier-latency-ms", type=float, default=0, help="of each call to the shared directory")
    add("--shards", type=int, default=8, help="files of weights (%(default)s)")
    add("--shard-mb", type=int, default=32, help="MB of each (%(default)s)")
    add("--segment", default="8MiB", help="of the shared store (%(default)s)")
    add("--claim-timeout", type=int, default=5, help="seconds of silence that end a claim (%(default)s)")
    add("--moments", default="0.05,0.2,0.5", help="when `killed` kills, as parts of the time (%(default)s)")
    add("--work", type=Path, default=Path("target"), help="where the files of a run are made (%(default)s)")
    add("--patience", type=int, default=120, help="seconds after which a fetch hangs (%(default)s)")
    add("--untimed", action="store_true", help="only show what took too long: on a noisy machine that is no failure")
    add("--verbose", action="count", default=0, help="run weightctl with -v")
    options = parser.parse_args()
    options.moments = [float(moment) for moment in options.moments.split(",")]
    if unknown := [name for name in options.scenarios if name not in PLAIN | SHARED]:
        parser.error(f"no such scenario: {', '.join(unknown)}")
    return options


class Rig:
    """What scenarios share: programs, model, and times that several are measured against."""

    def __init__(self, options, work):
        self.options, self.work, self.binaries = options, work, options.binaries.resolve()
        self.origin = Origin(self.binaries, work, options)
        self.alone_s = self.eight_s = None

    def at_link_rate(self):
        """Seconds that the model takes at the rate of one node's link."""
        return round(self.origin.size / MB / self.options.rate, 2)

    def alone(self):
        return self.alone_s or self.measured("alone", PLAIN["alone"], "alone_s")

    def eight(self):
        return self.eight_s or self.measured("eight", SHARED["eight"], "eight_s")

    def measured(self, name, scenario, attribute):
        problems = []
        figures = scenario(self, problems)
        if getattr(self, attribute) is None:
            raise RuntimeError(f"`{name}`, which this is measured against, failed: {problems} {figures}")
        return getattr(self, attribute)

    def is_late(self, problem):
        """Whether something only took too long, which is not judged on this machine."""
        return self.options.untimed and problem.startswith("seconds")

    def has_shared(self):
        shown = subprocess.run([self.binaries / "weightctl", "--help"], capture_output=True, text=True, check=True)
        return "--shared-root" in shown.stdout

    def run(self, name, scenario):
        problems, begin = [], time.monotonic()
        try:
            figures = scenario(self, problems)
        except Exception:
            problems.append(traceback.format_exc())
            figures = {}
        late = [problem for problem in problems if self.is_late(problem)]
        problems = [problem for problem in problems if problem not in late]
        figures |= {"late": late} if late else {}
        verdict = "failed" if problems else "ok"
        line = {"scenario": name, "verdict": verdict, "took_s": round(time.monotonic() - begin, 1), **figures}
        print(json.dumps(line | ({"problems": problems} if problems else {})), flush=True)
        return not problems


def inside(options, work):
    """In the namespaces. Ends cleanly when the outer process closes stdin, however that came to end."""

    def leave(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(130)

    def watch():
        # Not through `sys.stdin`, whose lock this thread would hold when the interpreter ends.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    rig = Rig(options, work)
    shared = rig.has_shared()
    names = options.scenarios or [*PLAIN, *SHARED]
    outcomes = []
    for name in names:
        if name in SHARED and not shared:
            skipped = {"scenario": name, "verdict": "skipped", "why": "weightctl has no --shared-root"}
            print(json.dumps(skipped), flush=True)
            # Who asks for it by name must not take it for done.
            outcomes.append(not options.scenarios)
        else:
            outcomes.append(rig.run(name, (PLAIN | SHARED)[name]))
    return 0 if all(outcomes) else 1


def outside(options):
    if os.geteuid() != 0:
        sys.exit("hosts: needs root, for namespaces with loop devices")
    options.work.mkdir(exist_ok=True)
    work = (options.work / f"hosts-{os.getpid()}").resolve()
    work.mkdir()
    apart = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--propagation", "private"]
    command = [*apart, sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    # Its own session: Ctrl-C reaches it as the end of stdin, once.
    own = {"stdin": subprocess.PIPE, "env": os.environ | {INNER: str(work)}, "start_new_session": True}
    inner = subprocess.Popen(command, **own)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: inner.stdin.close())
    try:
        return inner.wait()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main():
    options = arguments()
    work = os.environ.pop(INNER, None)
    return inside(options, Path(work)) if work else outside(options)


if __name__ == "__main__":
    sys.exit(main())
