"""Where the processor time of one download goes: samples of `perf`, sorted by what the processor was doing."""

import collections
import re
import subprocess

from . import measure

# The first that fits some function of a sample's stack, the innermost tried last, is what the sample is counted as: kernel
# first, by the system call that led there, as copies look alike at their end.
KINDS = [
    ("sockets: receive", r"tcp_recvmsg"),
    ("sockets: send, connect", r"tcp_sendmsg|tcp_v4_connect|inet_stream_connect|tcp_close|__sock_release"),
    ("write: disk, page cache", r"generic_perform_write|iomap_file_buffered_write|vfs_writev?|do_pwritev|ksys_pwrite64"),
    ("read back for the hash", r"filemap_read|vfs_read|ksys_pread64"),
    ("write-back and sync", r"sync_file_range|do_fsync|ext4_sync_file|writeback|jbd2"),
    ("files: open, link, rename, delete", r"do_filp_open|vfs_link|vfs_rename|vfs_unlink|do_linkat|do_renameat|do_mkdir|fallocate|newfstatat|statx|chmod"),
    ("memory: faults, map, unmap", r"exc_page_fault|asm_exc_page_fault|do_mmap|munmap|madvise|mprotect|exit_mmap"),
    ("wait: futex, epoll, scheduler", r"futex|epoll|schedule|eventfd|timerfd|clock_nanosleep"),
    ("start and end of the process", r"execve|do_exit|load_elf_binary|clone|_dl_|dl_main"),
    ("SHA-256", r"sha256|sha2::"),
    ("checksums of the journal and of claims", r"crc_fast|crc32|crc64|twox_hash"),
    ("allocation", r"malloc|_int_free|\bfree$|realloc|calloc|cfree|unlink_chunk"),
    ("copies in the program", r"__mem(cpy|move|set)|memcpy|memmove"),
    ("TLS", r"rustls|aws_lc|webpki"),
    ("HTTP: hyper, reqwest", r"hyper|reqwest|http::|httparse|h1::|tower"),
    ("AWS SDK", r"aws_s|aws_config|aws_runtime|aws_types|aws_credential|quick_xml|xmlparser"),
    ("tokio", r"tokio|mio::"),
    ("weightd", r"weightd|weightctl"),
    ("other kernel", r"entry_SYSCALL|do_syscall_64|asm_sysvec|syscall_enter|syscall_exit|\[k\]"),
]
RATE = 1999


def record(command, environment, work):
    """Runs a command under `perf record`; returns its samples, each a stack of functions, innermost first."""
    data = work / "perf.data"
    perf = ["perf", "record", "--quiet", "--event", "cpu-clock", "--freq", str(RATE), "--call-graph", "fp", "--output", data]
    measure.execute([*perf, "--", *command], environment, work / "perf.log")
    script = ["perf", "script", "--input", data, "--fields", "ip,sym,dso"]
    text = subprocess.run([str(part) for part in script], check=True, capture_output=True, text=True).stdout
    data.unlink()
    return [stack(sample) for sample in text.split("\n\n") if sample.strip()]


def stack(sample):
    found = []
    for line in sample.strip().splitlines():
        _, _, rest = line.strip().partition(" ")
        name, _, library = rest.rpartition(" (")
        found.append(f"{name} [k]" if "kernel" in library or library.startswith("[") else name)
    return found


def kind(functions):
    for name, pattern in COMPILED:
        # Of the program's own functions only the innermost counts: those around it called everything.
        looked_at = functions if any(each.endswith("[k]") for each in functions) else functions[:1]
        if any(pattern.search(each) for each in looked_at):
            return name
    return "other"


COMPILED = [(name, re.compile(pattern)) for name, pattern in KINDS]


def summarise(samples, gigabytes):
    """CPU seconds per GB of each kind and of the functions that take most, as text."""
    kinds = collections.Counter(kind(sample) for sample in samples)
    leaves = collections.Counter((kind(sample), sample[0].removesuffix(" [k]")) for sample in samples)
    seconds = lambda count: count / RATE / gigabytes
    lines = [f"{seconds(len(samples)):.2f} CPU s/GB, {len(samples)} samples", ""]
    for name, count in kinds.most_common():
        lines.append(f"{seconds(count):6.3f}  {count / len(samples):6.1%}  {name}")
        inner = [(leaf, many) for (of, leaf), many in leaves.most_common() if of == name][:6]
        lines += [f"{'':18}{seconds(many):6.3f}  {leaf[:110]}" for leaf, many in inner]
    return "\n".join(lines)
