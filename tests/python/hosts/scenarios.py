"""What happens to a cluster, and the bounds that must hold meanwhile.

A scenario is a function of the rig that returns its figures; what it appends to `problems` is its verdict. Those
of `PLAIN` need no shared tier and prove the rig itself, those of `SHARED` need `weightctl` to have one.
"""

import errno
import signal
import subprocess
import time

from hosts.cluster import FAKETIME, Cluster
from hosts.disk import damage
from hosts.network import MB, can_delay

# The egress bound of several nodes, and by how much a fetch may be slower than planned.
EGRESS = 1.02
SLACK = 1.2
STALL_S = 5
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "MB": 10**6, "GB": 10**9}


def bytes_of(text):
    unit = text.lstrip("0123456789")
    return int(text.removesuffix(unit)) * UNITS.get(unit, 1)


def all_end(fetches, problems):
    """Waits for all; returns the seconds that each took."""
    for fetch in fetches:
        status = fetch.wait()
        if status != 0:
            ending = "hangs" if status is None else f"exit status {status}"
            problems.append(f"{fetch.node.host.name}: {ending}: {fetch.said(600).strip()}")
    return [round(fetch.seconds or -1, 2) for fetch in fetches]


def all_right(cluster, problems, nodes=None):
    problems += [wrong for node in nodes or cluster.nodes if (wrong := node.wrong())]


def shared_right(cluster, problems):
    """No whole blob of the shared directory is anything but a file of the model."""
    count, wrong = cluster.wrong_shared()
    if wrong:
        problems.append(f"{len(wrong)} shared blobs have wrong bytes, such as {wrong[0]}")
    return {"shared_blobs": count}


def at_most(what, got, bound, problems):
    if got > bound:
        problems.append(f"{what}: {got:.3g}, at most {bound:.3g}")


def between(what, got, low, high, problems):
    if not low <= got <= high:
        problems.append(f"{what}: {got:.3g}, not between {low:.3g} and {high:.3g}")


# Without a shared tier


def throttle(rig, problems):
    """What one node reaches is the rate of its link, within 10 %; and the origin's bottleneck holds for two."""
    x = rig.options.rate
    with Cluster(rig, nodes=2, shared=False) as cluster:
        one = download(cluster, cluster.nodes[:1], rig)
        cluster.network.limit(cluster.network.hosts["origin"], x)
        two = download(cluster, cluster.nodes, rig)
    between("MB/s of one node", one, 0.9 * x, 1.1 * x, problems)
    between("MB/s of both behind a bottleneck", two, 0.9 * x, 1.1 * x, problems)
    return {"rate": x, "one_node": round(one, 2), "two_behind_a_bottleneck": round(two, 2), "netem": can_delay()}


def download(cluster, nodes, rig):
    """MB/s of plain downloads of one shard by Python, without weightd."""
    shard = max(rig.origin.files.iterdir(), key=lambda path: path.stat().st_size)
    url = f"{cluster.endpoint}/org/model/resolve/main/{shard.name}"
    program = "import sys, urllib.request as r\nwith r.urlopen(sys.argv[1]) as a:\n  while a.read(1 << 16): pass"
    begin = time.monotonic()
    readers = [node.host.start("python3", "-c", program, url) for node in nodes]
    if any([reader.wait() for reader in readers]):
        raise RuntimeError("the origin cannot be reached")
    return len(nodes) * shard.stat().st_size / MB / (time.monotonic() - begin)


def alone(rig, problems):
    """One node without a shared tier: what all others are measured against."""
    with Cluster(rig, nodes=1, shared=False) as cluster:
        fetch = cluster.nodes[0].fetch(shared=False)
        seconds, = all_end([fetch], problems)
        egress = cluster.egress()
        all_right(cluster, problems)
    if not problems:
        rig.alone_s = seconds
    between("egress ratio", egress["egress_ratio"], 0.99, EGRESS, problems)
    between("seconds", seconds, 0.95 * rig.at_link_rate(), 1.1 * rig.at_link_rate() + 1, problems)
    return {"seconds": seconds, "at_link_rate": rig.at_link_rate(), **egress}


def apart(rig, problems):
    """Eight nodes without a shared tier: each byte leaves the origin eight times."""
    with Cluster(rig, nodes=8, shared=False) as cluster:
        seconds = all_end([node.fetch(shared=False) for node in cluster.nodes], problems)
        egress = cluster.egress()
        all_right(cluster, problems)
    between("egress ratio", egress["egress_ratio"], 7.9, 8 * EGRESS, problems)
    return {"seconds": seconds, **egress}


def resumed(rig, problems):
    """Without a shared tier: killed and started anew; stopped and continued; cut off from the origin and back."""
    with Cluster(rig, nodes=3, shared=False) as cluster:
        killed, stopped, cut = cluster.nodes
        fetches = [node.fetch(shared=False) for node in cluster.nodes]
        time.sleep(rig.at_link_rate() * 0.3)
        fetches[0].kill()
        fetches[1].signal(signal.SIGSTOP)
        cut.partition(True)
        fetches[0].wait()
        before = cluster.network.sent_to(cut.host)
        time.sleep(2)
        while_cut = cluster.network.sent_to(cut.host) - before
        fetches[1].signal(signal.SIGCONT)
        cut.partition(False)
        fetches[0] = killed.fetch(shared=False)
        seconds = all_end(fetches, problems)
        all_right(cluster, problems)
        egress = cluster.egress()
    if while_cut:
        problems.append(f"{while_cut} bytes reached a node that was cut off")
    return {"again": seconds[0], "stopped": seconds[1], "cut": seconds[2], "nodes": 3, **egress}


def machinery(rig, problems):
    """The shared directory's own troubles reach the nodes, by plain file calls."""
    found = {}
    with Cluster(rig, nodes=2, disk_mb=192) as cluster:
        one, other = cluster.nodes
        rate = cluster.tier_rates(mb=16)
        found["tier_mb_s"] = round(rate, 1)
        if cluster.tier_rate:
            between("MB/s of the shared directory", rate, 0.8 * cluster.tier_rate, 1.1 * cluster.tier_rate, problems)
        look(cluster, one, "write", "made", problems)
        look(cluster, other, "read", "made", problems)
        look(cluster, other, "write", "made", problems, errno.EEXIST)
        cluster.disk.freeze()
        look(cluster, one, "write", "frozen", problems, "hangs")
        look(cluster, other, "read", "made", problems)
        cluster.disk.thaw()
        other.tier.order(stall=True)
        look(cluster, other, "read", "made", problems, "hangs")
        look(cluster, one, "read", "made", problems)
        other.tier.order(stall=False)
        cluster.disk.fill()
        look(cluster, one, "write", "full", problems, errno.ENOSPC)
        cluster.disk.empty()
        one.tier.unmount()
        look(cluster, one, "read", "made", problems, errno.ENOENT)
        other.tier.abort()
        look(cluster, other, "read", "made", problems, errno.ENOTCONN)
        one.remount()
        other.remount()
        look(cluster, other, "read", "made", problems)
        damage(cluster.disk.mount / "made", [100])
        look(cluster, other, "read", "made", problems, "differs")
        cluster.disk.read_only()
        look(cluster, one, "write", "late", problems, errno.EROFS)
    found["clock_ahead_s"] = clocks_move(rig, problems)
    return found


LOOK = """
import os, sys
how, path = sys.argv[1:]
try:
    if how == "read":
        sys.exit(0 if open(path, "rb").read() == bytes(1 << 20) else 255)
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(file, bytes(1 << 20))
    os.fsync(file)
except OSError as error:
    sys.exit(error.errno)
"""


def look(cluster, node, how, name, problems, expected=0):
    """One file read or written on a node: errno as the exit status, 255 if other bytes are there."""
    process = node.host.start("python3", "-c", LOOK, how, cluster.shared / name)
    try:
        got = process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        got = "hangs"
    got = "differs" if got == 255 else got
    if got != expected:
        problems.append(f"{how} {name} on {node.host.name}: got {got}, expected {expected}")


def clocks_move(rig, problems):
    """By how much a program of ours takes a wrong clock: from the times of its own log."""
    if not FAKETIME.exists():
        return None
    with Cluster(rig, nodes=1, shared=False, clocks=[420]) as cluster:
        node = cluster.nodes[0]
        cluster.network.limit(node.host, None)
        all_end([node.fetch(shared=False)], problems)
        command = [cluster.binaries / "weightctl", "--root", node.root, "ls", "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
    last_used = int(done.stdout.split('"last_used":')[1].split(",")[0])
    ahead = last_used - time.time()
    between("seconds that a wrong clock is ahead", ahead, 405, 425, problems)
    return round(ahead)


# With a shared tier


def together(rig, problems, clocks=()):
    with Cluster(rig, nodes=8, clocks=clocks) as cluster:
        tier = cluster.tier_rates()
        cluster.forget_requests()
        seconds = all_end([node.fetch() for node in cluster.nodes], problems)
        egress = cluster.egress()
        all_right(cluster, problems)
        shared = shared_right(cluster, problems)
    size, nodes = rig.origin.size / MB, 8
    bound = (size / (nodes * rig.options.rate) + size * (nodes - 1) / nodes / tier) * SLACK
    at_most("egress ratio", egress["egress_ratio"], EGRESS, problems)
    at_most("seconds", max(seconds), bound, problems)
    figures = {"seconds": seconds, "slowest": max(seconds), "bound": round(bound, 2), "alone": rig.alone()}
    return figures | {"tier_mb_s": round(tier, 1), **egress, **shared}


def eight(rig, problems):
    """Eight cold nodes at once."""
    figures = together(rig, problems)
    if all(rig.is_late(problem) for problem in problems):
        rig.eight_s = figures["slowest"]
    return figures


def clocks(rig, problems):
    """The same with clocks that disagree by up to 14 minutes."""
    if not FAKETIME.exists():
        problems.append(f"{FAKETIME} is missing: install libfaketime")
        return {}
    return together(rig, problems, clocks=[420, -420, 0, 420, -420, 0, 420, -420])


def killed(rig, problems):
    """A node dies while it holds claims; the others wait for no more than the claim timeout.

    What it had claimed is fetched anew after that, so one segment's time is granted on top.
    """
    before, figures = rig.eight(), []
    segment = bytes_of(rig.options.segment) / MB / rig.options.rate
    bound = before + (rig.options.claim_timeout + segment) * 1.1
    for moment in rig.options.moments:
        with Cluster(rig) as cluster:
            fetches = [node.fetch() for node in cluster.nodes]
            time.sleep(before * moment)
            claims = len(cluster.claims())
            fetches[0].kill()
            fetches[0].wait()
            seconds = all_end(fetches[1:], problems)
            again = all_end([cluster.nodes[0].fetch()], problems)
            all_right(cluster, problems)
            shared = shared_right(cluster, problems)
            egress = cluster.egress()
        at_most(f"seconds after a kill at {moment} of the time", max(seconds), bound, problems)
        one = {"moment": moment, "claims_then": claims, "slowest": max(seconds), "the_killed_again": again[0]}
        figures.append(one | egress | shared)
    return {"without_kill": before, "bound": round(bound, 2), "runs": figures}


def partition(rig, problems):
    """A node loses the origin while it holds claims, and gets it back when the others have ended."""
    before = rig.eight()
    segment = bytes_of(rig.options.segment) / MB / rig.options.rate
    bound = before + (rig.options.claim_timeout + segment) * 1.1 + STALL_S
    with Cluster(rig) as cluster:
        fetches = [node.fetch() for node in cluster.nodes]
        time.sleep(before * 0.15)
        claims = len(cluster.claims())
        cluster.nodes[0].partition(True)
        seconds = all_end(fetches[1:], problems)
        ended_cut = not fetches[0].running()
        cluster.nodes[0].partition(False)
        own = all_end(fetches[:1], problems)
        all_right(cluster, problems)
        figures = shared_right(cluster, problems) | cluster.egress()
    at_most("seconds of the others", max(seconds), bound, problems)
    figures |= {"claims_then": claims, "slowest": max(seconds), "bound": round(bound, 2), "without": before}
    return figures | {"cut_node": own[0], "ended_while_cut": ended_cut}


def slow_tier(rig, problems):
    """A shared tier slower than the origin costs a node that may choose no more than 10 %."""
    slow, alone_s = rig.options.rate / 4, rig.alone()
    with Cluster(rig, nodes=2) as cluster:
        warm(cluster, cluster.nodes[1], problems)
        cluster.nodes[0].tier.order(read_rate=slow * MB, write_rate=slow * MB)
        full = all_end([cluster.nodes[0].fetch(EGRESS="fastest")], problems)[0]
        all_right(cluster, problems)
    with Cluster(rig, nodes=4, tier_rate=slow) as cluster:
        cold = all_end([node.fetch(EGRESS="fastest") for node in cluster.nodes], problems)
        all_right(cluster, problems)
        figures = shared_right(cluster, problems) | cluster.egress()
    at_most("seconds with a slow full tier", full, alone_s * 1.1, problems)
    at_most("seconds with a slow empty tier", max(cold), alone_s * 1.1, problems)
    return {"tier_mb_s": slow, "alone": alone_s, "full_tier": full, "empty_tier": cold, **figures}


def warm(cluster, node, problems):
    """Fills the shared tier by one node with an unlimited link and mount."""
    cluster.network.limit(node.host, None)
    node.tier.order(read_rate=None, write_rate=None)
    all_end([node.fetch()], problems)
    if not cluster.landed():
        problems.append("nothing is in the shared directory after a fetch")


def trouble(rig, problems, strike, nodes=4, after=lambda cluster: {}):
    """Nodes fetch at once, and `strike` hits the shared directory in the middle, for good."""
    alone_s = rig.alone()
    bound = alone_s * 1.1 + STALL_S + rig.options.claim_timeout
    with Cluster(rig, nodes=nodes) as cluster:
        fetches = [node.fetch() for node in cluster.nodes]
        time.sleep(rig.at_link_rate() / nodes * 0.5)
        struck = {"landed_then": len(cluster.landed())} | (strike(cluster, fetches) or {})
        seconds = all_end(fetches, problems)
        cluster.disk.thaw()
        all_right(cluster, problems)
        if below := [path.name for path in cluster.shared.iterdir()]:
            problems.append(f"written below the mount point: {below}")
        struck |= after(cluster) | cluster.egress()
    at_most("seconds", max(seconds), bound, problems)
    return {"seconds": seconds, "alone": alone_s, "bound": round(bound, 2), **struck}


def freeze(rig, problems):
    """The shared file system is frozen: writes wait for ever, reads go on."""
    return trouble(rig, problems, lambda cluster, _: cluster.freeze())


def stall(rig, problems):
    """The shared file system answers nothing any more."""

    def strike(cluster, _):
        for node in cluster.nodes:
            node.tier.order(stall=True)

    return trouble(rig, problems, strike)


def unmount(rig, problems):
    """Half of the nodes lose the mount by `umount --lazy`, half by an end of the connection."""

    def strike(cluster, _):
        for node in cluster.nodes:
            if node.number % 2:
                node.tier.unmount()
            else:
                node.tier.abort()

    return trouble(rig, problems, strike)


def full(rig, problems):
    """The shared file system fills up."""

    def strike(cluster, _):
        return {"left": cluster.disk.fill()}

    return trouble(rig, problems, strike, after=lambda cluster: shared_right(cluster, problems))


def readonly(rig, problems):
    """The shared file system turns read-only, as after an error of its disk."""

    def strike(cluster, _):
        cluster.disk.read_only()

    return trouble(rig, problems, strike, after=lambda cluster: shared_right(cluster, problems))


def corrupt(rig, problems):
    """Segments change after they have landed; then a new node comes, and nothing wrong is left."""
    size, struck = bytes_of(rig.options.segment), set()

    def strike(cluster, fetches):
        while len(struck) < 8 and any(fetch.running() for fetch in fetches):
            for whole, sums in cluster.landed():
                if sums not in struck and len(struck) < 8:
                    struck.add(sums)
                    first = int(sums.stem) * size
                    length = min(size, whole.stat().st_size - first)
                    damage(whole, [first + length // 2])
            time.sleep(0.1)
        return {"damaged": len(struck)}

    def after(cluster):
        node = cluster.nodes[0]
        wrong_before = len(cluster.wrong_shared()[1])
        fetch = node.fetch(root=node.work / "second")
        seconds = all_end([fetch], problems)
        if wrong := node.wrong(node.work / "second"):
            problems.append(f"second fetch: {wrong}")
        return {"wrong_shared": wrong_before, "second_fetch": seconds[0], **shared_right(cluster, problems)}

    figures = trouble(rig, problems, strike, after=after)
    if not struck:
        problems.append("nothing landed that could be damaged")
    return figures


def flap(rig, problems):
    """A daemon whose tier went and came back uses it again without a restart."""
    with Cluster(rig, nodes=2) as cluster:
        node, other = cluster.nodes
        warm(cluster, other, problems)
        cluster.network.limit(node.host, rig.options.rate * 4)
        segment, claims = rig.options.segment, f"{rig.options.claim_timeout}s"
        node.start_daemon(root=str(cluster.shared), segment=segment, claim_timeout=claims)
        figures = {"with_tier": daemon_fetch(cluster, node, problems)}
        node.tier.unmount()
        node.tier.close()
        figures["without_tier"] = daemon_fetch(cluster, node, problems)
        node.mount()
        begin = time.monotonic()
        while True:
            figures["tier_is_back"] = daemon_fetch(cluster, node, problems)
            figures["used_again_after_s"] = round(time.monotonic() - begin, 1)
            if figures["tier_is_back"]["egress_ratio"] < 0.05:
                break
            if time.monotonic() - begin > 60 or problems:
                problems.append("the daemon does not use the tier that came back")
                break
            time.sleep(1)
        if below := [path.name for path in cluster.shared.iterdir()]:
            problems.append(f"written below the mount point: {below}")
    at_most("egress ratio with a full tier", figures["with_tier"]["egress_ratio"], 0.05, problems)
    return figures


def daemon_fetch(cluster, node, problems):
    """Fetches by the daemon, checks, and removes what was fetched."""
    cluster.forget_requests()
    begin = time.monotonic()
    status, printed = node.ctl("prefetch", "hf://org/model")
    seconds = round(time.monotonic() - begin, 2)
    if status != 0:
        problems.append(f"prefetch by the daemon: exit status {status}: {node.daemon_said()}")
    all_right(cluster, problems, [node])
    for command in (["rm", printed["model"]] if printed else [], ["gc"]):
        if command and node.ctl(*command)[0] != 0:
            problems.append(f"{command}: failed: {node.daemon_said()}")
    return {"seconds": seconds, **cluster.egress()}


PLAIN = {"throttle": throttle, "alone": alone, "apart": apart, "resumed": resumed, "machinery": machinery}
SHARED = {"eight": eight, "killed": killed, "partition": partition, "slow-tier": slow_tier, "freeze": freeze}
SHARED |= {"stall": stall, "unmount": unmount, "full": full, "readonly": readonly, "corrupt": corrupt}
SHARED |= {"clocks": clocks, "flap": flap}
