"""A network namespace at the end of a long link: a rate and a round trip, whatever the kernel's tc has.

Kernels of small machines lack `netem`. Two TUN devices do as well: one here, one in a namespace of its own, and this
program carries packets between them, each at its time. The devices hand over whole bursts (TSO), so that there are
few; TCP sees ordinary segments, a queue that fills, and losses when it overflows.
"""

import collections
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time

HERE, THERE = "10.79.0.1", "10.79.0.2"
MTU = "1500"

# Source: linux/if_tun.h.
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
CLONE_NEWNET = 0x40000000

PACKET_BYTES = 70_000
# Of a queue at the link, in seconds of its rate: what is more is lost, as at a router.
QUEUE_SECONDS = 0.1


class Link:
    """Lives as long as its `with` block; `within` makes a command one at its far end."""

    def __init__(self, bits_per_second, round_trip_seconds):
        self.arguments = [str(bits_per_second), str(round_trip_seconds)]

    def __enter__(self):
        far = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]
        self.far = subprocess.Popen(far, stdout=subprocess.PIPE)
        self.far.stdout.readline()
        relay = [sys.executable, __file__, str(self.far.pid), *self.arguments]
        self.relay = subprocess.Popen(relay, stdout=subprocess.PIPE)
        if not self.relay.stdout.readline():
            raise RuntimeError("the link between two network namespaces cannot be made")
        return self

    def __exit__(self, *_):
        for process in (self.relay, self.far):
            process.kill()
            process.wait()
            process.stdout.close()

    def within(self, *command):
        return ["nsenter", "--target", str(self.far.pid), "--net", "--", *map(str, command)]


def tun(name, address):
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    for command in (["address", "add", f"{address}/24", "dev", name], ["link", "set", name, "mtu", MTU, "up"]):
        subprocess.run(["ip", *command], check=True)
    return device


def relay(far, bytes_per_second, delay):
    here = tun("link-here", HERE)
    with open(f"/proc/{far}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    there = tun("link-there", THERE)
    print("up", flush=True)
    ways = {here: Way(there, bytes_per_second, delay), there: Way(here, bytes_per_second, delay)}
    while True:
        due = min(way.due() for way in ways.values())
        wait = None if due == float("inf") else max(0, due - time.monotonic())
        ready, _, _ = select.select(list(ways), [], [], wait)
        for device in ready:
            ways[device].take(device)
        for way in ways.values():
            way.deliver()


class Way:
    """One direction: packets wait their turn at the link, and then for the distance."""

    def __init__(self, out, bytes_per_second, delay):
        self.out, self.rate, self.delay = out, bytes_per_second, delay
        self.waiting, self.free = collections.deque(), 0.0

    def due(self):
        return self.waiting[0][0] if self.waiting else float("inf")

    def take(self, device):
        for _ in range(64):
            try:
                packet = os.read(device, PACKET_BYTES)
            except BlockingIOError:
                return
            now = time.monotonic()
            if self.free - now > QUEUE_SECONDS:
                continue
            self.free = max(self.free, now) + len(packet) / self.rate
            self.waiting.append((self.free + self.delay, packet))

    def deliver(self):
        now = time.monotonic()
        while self.waiting and self.waiting[0][0] <= now:
            _, packet = self.waiting.popleft()
            try:
                os.write(self.out, packet)
            except OSError:
                continue


if __name__ == "__main__":
    relay(int(sys.argv[1]), float(sys.argv[2]) / 8, float(sys.argv[3]) / 2)
