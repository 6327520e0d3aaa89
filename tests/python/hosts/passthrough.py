"""One node's mount of the shared directory: a FUSE file system that passes calls on to a directory.

    python passthrough.py SOURCE TARGET

Speaks the kernel's protocol (linux/fuse.h, 7.31 and later) itself, so it needs nothing but Python. It keeps
no data and no names in the node's caches: what one node wrote another one sees at once, as on Lustre, and
every read costs what it says. Locks are the node's own, as on Lustre mounted with `localflock`.

Orders come in as lines of JSON on stdin, each answered by a line on stdout; it unmounts when stdin closes:

    {"read_rate": BYTES_PER_SECOND, "write_rate": …, "latency": SECONDS}    null: without limit
    {"stall": true}         from now on no call is answered, until {"stall": false}; {"stall_writes": …}: only those
                            that would change something. As with NFS and Lustre, who is killed need not wait
    {"fail": ERRNO}         every call fails; {"fail_writes": ERRNO}: every call that would change something
    {"skew": SECONDS}       files that this node changes get times so far off, as from a client's own clock
    {"abort": true}         the connection ends: every call gets ENOTCONN, open files too
    {}                      only the answer, which holds the bytes read and written so far
"""

import ctypes
import errno
import json
import os
import signal
import stat
import struct
import sys
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2
THREADS = 24
MAX_IO = 1 << 20
# Calls of less than this pass at once when nothing was asked for of late.
BURST_SECONDS = 0.02

(LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK) = range(1, 7)
(MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE) = range(8, 19)
(FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR) = (20, 25, 26, 27, 28, 29, 30)
(ACCESS, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE, RENAME2, LSEEK) = (34, 35, 36, 38, 42, 43, 45, 46)
CHANGES = {SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, CREATE, FALLOCATE, RENAME2}
NO_ANSWER = {FORGET, BATCH_FORGET, INTERRUPT}

IN = struct.Struct("<IIQQIIIHH")
OUT = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
SETATTR_IN = struct.Struct("<IIQQQQQQIIIIIIII")
IO_IN = struct.Struct("<QQIIQII")
# Reads in parallel, bigger writes, no data kept past a change, creates and lookups in parallel, whole pages.
INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 12 | 1 << 15 | 1 << 18 | 1 << 22
FOPEN_DIRECT_IO = 1
(SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME) = (1 << bit for bit in range(6))
(SET_FH, SET_ATIME_NOW, SET_MTIME_NOW) = (1 << 6, 1 << 7, 1 << 8)


class Pace:
    """Lets so many bytes a second through."""

    def __init__(self):
        self.lock, self.rate, self.free_at, self.bytes = threading.Lock(), None, 0.0, 0

    def take(self, count):
        with self.lock:
            self.bytes += count
            if not self.rate:
                return
            now = time.monotonic()
            self.free_at = max(self.free_at, now - BURST_SECONDS) + count / self.rate
            wait = self.free_at - now
        if wait > 0:
            time.sleep(wait)


class Passthrough:
    def __init__(self, source, device):
        self.device, self.lock = device, threading.Lock()
        root = os.open(source, os.O_PATH | os.O_DIRECTORY)
        # Of each number the kernel knows: a descriptor, how often it was looked up, which inode it is.
        self.nodes, self.numbers, self.next = {1: [root, 1, None]}, {}, 2
        self.reads, self.writes, self.caller = Pace(), Pace(), threading.local()
        self.latency, self.fail, self.fail_writes, self.skew = 0, None, None, 0
        self.gate, self.write_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.write_gate.set()
        names = {name: value for name, value in globals().items() if isinstance(value, int)}
        operations = {value: name for name, value in names.items() if hasattr(self, f"do_{name.lower()}")}
        self.calls = {value: getattr(self, f"do_{name.lower()}") for value, name in operations.items()}

    def serve(self):
        buffer = bytearray(MAX_IO + (1 << 16))
        view = memoryview(buffer)
        while True:
            try:
                count = os.readv(self.device, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return
            header = IN.unpack_from(buffer)
            self.answer(header, view[IN.size : count])

    def answer(self, header, body):
        _, operation, unique, node, _, _, self.caller.thread, *_ = header
        number, result = 0, b""
        try:
            if operation not in NO_ANSWER and operation != INIT:
                self.wait(operation)
            call = self.calls.get(operation)
            if call is None:
                raise OSError(errno.ENOSYS, "not done here")
            result = call(node, body) or b""
        except OSError as error:
            number = -(error.errno or errno.EIO)
        if operation in NO_ANSWER:
            return
        reply = OUT.pack(OUT.size + len(result), number, unique)
        try:
            os.writev(self.device, [reply, result])
        except OSError:
            # Nobody waits for it any more: interrupted or unmounted.
            pass

    def wait(self, operation):
        gates = [self.gate, self.write_gate] if operation in CHANGES else [self.gate]
        for gate in gates:
            while not gate.wait(0.2):
                # The kernel lets nobody go whose call was taken up, not even by SIGKILL.
                if dies(self.caller.thread):
                    raise OSError(errno.EINTR, "killed")
        if self.latency:
            time.sleep(self.latency)
        failure = self.fail or (self.fail_writes if operation in CHANGES else None)
        if failure:
            raise OSError(failure, "as ordered")

    # Names and inodes

    def path(self, node):
        with self.lock:
            return f"/proc/self/fd/{self.nodes[node][0]}"

    def at(self, node):
        with self.lock:
            return self.nodes[node][0]

    def entry(self, parent, name):
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.at(parent))
        status = os.fstat(descriptor)
        key = (status.st_dev, status.st_ino)
        with self.lock:
            number = self.numbers.get(key)
            if number is None:
                number, self.next = self.next, self.next + 1
                self.numbers[key], self.nodes[number] = number, [descriptor, 0, key]
                descriptor = None
            self.nodes[number][1] += 1
        if descriptor is not None:
            os.close(descriptor)
        return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + attributes(status)

    def forget(self, node, count):
        with self.lock:
            known = self.nodes.get(node)
            if known is None or node == 1:
                return
            known[1] -= count
            if known[1] <= 0:
                del self.nodes[node], self.numbers[known[2]]
                os.close(known[0])

    def stamp(self, where):
        """`where` is a descriptor or path of what was changed."""
        if self.skew:
            now = time.time_ns() + int(self.skew * 1e9)
            os.utime(where, ns=(now, now))

    def do_init(self, _, body):
        _, minor, readahead, flags = struct.unpack_from("<IIII", body)
        answer = (7, min(minor, 38), readahead, flags & INIT_FLAGS, 64, 48, MAX_IO, 1, MAX_IO // 4096)
        return struct.pack("<IIIIHHIIHH", *answer, 0) + bytes(32)

    def do_destroy(self, *_):
        return b""

    def do_lookup(self, node, body):
        return self.entry(node, text(body))

    def do_forget(self, node, body):
        self.forget(node, struct.unpack_from("<Q", body)[0])

    def do_batch_forget(self, _, body):
        for number in range(struct.unpack_from("<I", body)[0]):
            self.forget(*struct.unpack_from("<QQ", body, 8 + 16 * number))

    def do_getattr(self, node, _):
        return bytes(16) + attributes(os.stat(self.path(node)))

    def do_setattr(self, node, body):
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = (
            SETATTR_IN.unpack_from(body)
        )
        where = handle if valid & SET_FH else self.path(node)
        if valid & SET_MODE:
            os.chmod(where, stat.S_IMODE(mode))
        if valid & (SET_UID | SET_GID):
            os.chown(where, uid if valid & SET_UID else -1, gid if valid & SET_GID else -1)
        if valid & SET_SIZE:
            os.truncate(where, size)
            self.stamp(where)
        if valid & (SET_ATIME | SET_MTIME):
            now, was = time.time_ns() + int(self.skew * 1e9), os.stat(where)
            # Rounded by Python otherwise: seconds and nanoseconds come apart.
            times = [was.st_atime_ns, was.st_mtime_ns]
            asked = [(SET_ATIME, SET_ATIME_NOW, atime, atime_ns), (SET_MTIME, SET_MTIME_NOW, mtime, mtime_ns)]
            for place, (given, at_once, seconds, nanoseconds) in enumerate(asked):
                if valid & given:
                    times[place] = now if valid & at_once else seconds * 10**9 + nanoseconds
            os.utime(where, ns=tuple(times))
        return bytes(16) + attributes(os.stat(where))

    def do_readlink(self, node, _):
        return os.fsencode(os.readlink("", dir_fd=self.at(node)))

    def do_symlink(self, node, body):
        name, target = bytes(body).split(b"\0")[:2]
        os.symlink(target, name, dir_fd=self.at(node))
        return self.entry(node, name)

    def do_mknod(self, node, body):
        mode, device = struct.unpack_from("<II", body)
        os.mknod(text(body[16:]), mode, device, dir_fd=self.at(node))
        return self.entry(node, text(body[16:]))

    def do_mkdir(self, node, body):
        mode, name = struct.unpack_from("<I", body)[0], text(body[8:])
        os.mkdir(name, mode, dir_fd=self.at(node))
        return self.entry(node, name)

    def do_unlink(self, node, body):
        os.unlink(text(body), dir_fd=self.at(node))

    def do_rmdir(self, node, body):
        os.rmdir(text(body), dir_fd=self.at(node))

    def do_rename(self, node, body):
        self.rename(node, struct.unpack_from("<Q", body)[0], 0, body[8:])

    def do_rename2(self, node, body):
        target, flags = struct.unpack_from("<QI", body)
        self.rename(node, target, flags, body[16:])

    def rename(self, node, target, flags, names):
        old, new = bytes(names).split(b"\0")[:2]
        if LIBC.renameat2(self.at(node), old, self.at(target), new, flags) != 0:
            raise OSError(ctypes.get_errno(), "renameat2")

    def do_link(self, node, body):
        name = text(body[8:])
        source = self.path(struct.unpack_from("<Q", body)[0])
        os.link(source, name, dst_dir_fd=self.at(node), follow_symlinks=True)
        return self.entry(node, name)

    # Files

    def do_open(self, node, body):
        flags = struct.unpack_from("<I", body)[0] & ~(os.O_NOFOLLOW | os.O_DIRECT | os.O_APPEND)
        return struct.pack("<QIi", os.open(self.path(node), flags), FOPEN_DIRECT_IO, 0)

    def do_create(self, node, body):
        flags, mode = struct.unpack_from("<II", body)
        name, flags = text(body[16:]), flags & ~(os.O_DIRECT | os.O_APPEND) | os.O_CREAT
        handle = os.open(name, flags, mode, dir_fd=self.at(node))
        self.stamp(handle)
        return self.entry(node, name) + struct.pack("<QIi", handle, FOPEN_DIRECT_IO, 0)

    def do_read(self, _, body):
        handle, offset, size, *_ = IO_IN.unpack_from(body)
        found = os.pread(handle, size, offset)
        self.reads.take(len(found))
        return found

    def do_write(self, _, body):
        handle, offset, size, *_ = IO_IN.unpack_from(body)
        self.writes.take(size)
        # A stall that began while this one waited holds it too.
        self.wait(WRITE)
        written = os.pwrite(handle, body[IO_IN.size : IO_IN.size + size], offset)
        self.stamp(handle)
        return struct.pack("<II", written, 0)

    def do_flush(self, _, body):
        # Brings up what the file system found out late, as close does.
        os.close(os.dup(struct.unpack_from("<Q", body)[0]))

    def do_release(self, _, body):
        os.close(struct.unpack_from("<Q", body)[0])

    def do_fsync(self, _, body):
        handle, flags = struct.unpack_from("<QI", body)
        (os.fdatasync if flags & 1 else os.fsync)(handle)

    def do_fallocate(self, _, body):
        handle, offset, length, mode = struct.unpack_from("<QQQI", body)
        arguments = handle, mode, ctypes.c_long(offset), ctypes.c_long(length)
        if LIBC.fallocate(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")

    def do_lseek(self, _, body):
        handle, offset, whence = struct.unpack_from("<QQI", body)
        return struct.pack("<Q", os.lseek(handle, offset, whence))

    def do_statfs(self, node, _):
        found = os.statvfs(self.path(node))
        counts = found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree
        return struct.pack("<5Q4I", *counts, found.f_bsize, found.f_namemax, found.f_frsize, 0) + bytes(24)

    # Directories

    def do_opendir(self, node, _):
        return struct.pack("<QIi", os.open(self.path(node), os.O_RDONLY | os.O_DIRECTORY), 0, 0)

    def do_readdir(self, _, body):
        handle, offset, size, *_ = IO_IN.unpack_from(body)
        # A fresh look at each turn. The offset is a count, so a name may be missed or come twice when others
        # change the directory meanwhile, which POSIX allows.
        with os.scandir(handle) as found:
            entries = [(entry.inode(), os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in found]
        answer = b""
        for number, (inode, name, is_directory) in enumerate(entries[offset:], offset + 1):
            kind = stat.S_IFDIR >> 12 if is_directory else 0
            one = struct.pack("<QQII", inode, number, len(name), kind) + name
            one += bytes(-len(one) % 8)
            if len(answer) + len(one) > size:
                break
            answer += one
        return answer

    do_releasedir, do_fsyncdir = do_release, do_fsync

    # Orders

    def obey(self, order):
        for name in ("latency", "fail", "fail_writes", "skew"):
            if name in order:
                setattr(self, name, order[name])
        if "read_rate" in order:
            self.reads.rate = order["read_rate"]
        if "write_rate" in order:
            self.writes.rate = order["write_rate"]
        for name, gate in (("stall", self.gate), ("stall_writes", self.write_gate)):
            if name in order:
                (gate.clear if order[name] else gate.set)()
        return {"read": self.reads.bytes, "written": self.writes.bytes}


def dies(thread):
    """Whether a thread has SIGKILL pending, as all have of a process that is killed or exits."""
    if not thread:
        return False
    try:
        with open(f"/proc/{thread}/status") as status:
            pending = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd"))]
    except OSError:
        return True
    return any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)


def text(body):
    return bytes(body).split(b"\0", 1)[0]


def attributes(status):
    times = status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns
    seconds, rests = zip(*(divmod(time, 10**9) for time in times))
    head = status.st_ino, status.st_size, status.st_blocks, *(second % (1 << 64) for second in seconds)
    tail = status.st_mode, status.st_nlink, status.st_uid, status.st_gid, 0, 4096, 0
    return ATTR.pack(*head, *rests, *tail)


def mount(target):
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_IO}"
    if LIBC.mount(b"hosts", os.fsencode(target), b"fuse.hosts", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount at", target)
    return device


def main(source, target):
    # Kept as asked for: the node has a umask of its own.
    os.umask(0)
    device = mount(target)
    served = Passthrough(source, device)
    for _ in range(THREADS):
        threading.Thread(target=served.serve, daemon=True).start()
    print(json.dumps({"mounted": target}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(served.obey(order)), flush=True)
        if order.get("abort"):
            # The kernel ends the connection with the last descriptor, and this one is the last.
            os._exit(0)
    LIBC.umount2(os.fsencode(target), MNT_DETACH)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
