"""Hosts: each a network, mount and UTS namespace, all joined by one bridge, with limits on their links.

The caller's network namespace is the switch, so it must be one of its own. `tc` has `tbf` here and no `netem`
on some kernels, so links have a rate and, if the kernel can, a delay.
"""

import os
import subprocess
from pathlib import Path

MB = 1_000_000
ORIGIN = "10.77.0.1"
# Of the link by which the caller asks the origin things, past all limits and counters.
CALLER, CALLER_ORIGIN = "10.78.0.254", "10.78.0.1"
# Jumbo frames: headers are less than 1 % of the rate, and the machine has less to do.
MTU = "9000"
# Of one connection, in bytes of buffer: least, at first, most. Plenty for hosts this close to each other.
WINDOW = "4096 65536 262144"


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options)


class Host:
    """Namespaces that live as long as one sleeping process in them."""

    def __init__(self, name):
        self.name, self.port = name, f"sw-{name}"
        hold = f"hostname {name} && echo {WINDOW} >/proc/sys/net/ipv4/tcp_rmem && ip link set lo up"
        hold += " && echo held && exec sleep infinity"
        command = ["unshare", "--net", "--mount", "--uts", "--propagation", "private", "sh", "-c", hold]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        self.holder = subprocess.Popen(command, start_new_session=True, **pipes)
        self.holder.stdout.readline()

    def within(self, *command):
        """The command line that runs a command on this host, as the process that is started."""
        enter = ["nsenter", "--target", str(self.holder.pid), "--net", "--mount", "--uts", "--"]
        return [*enter, *(str(part) for part in command)]

    def run(self, *command, **options):
        return run(*self.within(*command), **options)

    def start(self, *command, **options):
        return subprocess.Popen(self.within(*command), start_new_session=True, **options)

    def close(self):
        self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()


class Network:
    def __init__(self):
        run("ip", "link", "add", "bridge0", "type", "bridge")
        run("ip", "link", "set", "bridge0", "mtu", MTU, "up")
        self.hosts = {}

    def add(self, name, address):
        host = self.hosts[name] = Host(name)
        peer = ["peer", "name", "eth0", "mtu", MTU, "netns", host.holder.pid]
        run("ip", "link", "add", host.port, "mtu", MTU, "type", "veth", *peer)
        run("ip", "link", "set", host.port, "master", "bridge0", "up")
        host.run("ip", "address", "add", f"{address}/16", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        return host

    def add_origin(self):
        origin = self.add("origin", ORIGIN)
        run("ip", "link", "add", "direct0", "type", "veth", "peer", "name", "direct0", "netns", origin.holder.pid)
        run("ip", "address", "add", f"{CALLER}/24", "dev", "direct0")
        run("ip", "link", "set", "direct0", "up")
        origin.run("ip", "address", "add", f"{CALLER_ORIGIN}/24", "dev", "direct0")
        origin.run("ip", "link", "set", "direct0", "up")
        run("ip", "route", "add", ORIGIN, "via", CALLER_ORIGIN)
        return origin

    def limit(self, host, mb_s, delay_ms=0):
        """What reaches `host`, or with the origin what leaves it, in MB (10^6 bytes) a second; None: unlimited."""
        if host.name == "origin":
            enter, device = host.within(), "eth0"
        else:
            enter, device = [], host.port
        subprocess.run([*enter, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True)
        parent = ["root", "handle", "1:"]
        if mb_s:
            # A queue that holds the windows of all connections of a node (`WINDOW`): what was dropped would crawl
            # back for seconds at times, and the figures would be those of TCP.
            burst, queue = max(128_000, int(mb_s * MB * 0.004)), max(8_000_000, int(mb_s * MB * 0.2))
            tbf = ["tbf", "rate", f"{int(mb_s * 8000)}kbit", "burst", str(burst), "limit", str(queue)]
            run(*enter, "tc", "qdisc", "add", "dev", device, *parent, *tbf)
            parent = ["parent", "1:1", "handle", "2:"]
        if delay_ms:
            netem = ["netem", "delay", f"{delay_ms}ms", "limit", "100000"]
            run(*enter, "tc", "qdisc", "add", "dev", device, *parent, *netem)

    def link(self, host, up):
        run("ip", "link", "set", host.port, "up" if up else "down")

    def received(self, host):
        """Bytes that the switch got from a host: with the origin's, all that it sent to nodes."""
        return int(port_counters(host.port)[0])

    def sent_to(self, host):
        return int(port_counters(host.port)[8])

    def close(self):
        for host in self.hosts.values():
            # The pair goes with either end; a namespace alone goes only some time after its last process.
            subprocess.run(["ip", "link", "delete", host.port], capture_output=True)
            host.close()
        for name in ("bridge0", "direct0"):
            subprocess.run(["ip", "link", "delete", name], capture_output=True)


def port_counters(port):
    for line in Path(f"/proc/{os.getpid()}/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == port:
            return counters.split()
    raise KeyError(port)


def can_delay():
    """Whether this kernel has netem."""
    found = subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"], capture_output=True)
    if found.returncode == 0:
        run("tc", "qdisc", "del", "dev", "lo", "root")
    return found.returncode == 0
