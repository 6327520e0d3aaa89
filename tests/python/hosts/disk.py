"""The disk behind the shared directory: ext4 on a loop device on a sparse file, and what can happen to it."""

import os
import subprocess
import time
from pathlib import Path

from hosts.network import run


class Disk:
    def __init__(self, work, size):
        self.image, self.mount = Path(work) / "disk.img", Path(work) / "disk"
        self.frozen = False
        with open(self.image, "wb") as image:
            image.truncate(size)
        options = ["-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=1,nodiscard"]
        run("mkfs.ext4", *options, self.image)
        self.device = run("losetup", "--find", "--show", self.image).stdout.strip()
        self.mount.mkdir(exist_ok=True)
        try:
            run("mount", "-o", "errors=remount-ro,noatime", self.device, self.mount)
        finally:
            # From here on the device goes with the last mount, even if this program is killed.
            run("losetup", "--detach", self.device)

    def freeze(self):
        """Whoever writes waits, and cannot be killed meanwhile; reads go on."""
        run("fsfreeze", "--freeze", self.mount)
        self.frozen = True

    def thaw(self):
        if self.frozen:
            run("fsfreeze", "--unfreeze", self.mount)
            self.frozen = False

    def fill(self, leave=0):
        """Takes all room but `leave` bytes."""
        found = os.statvfs(self.mount)
        take = found.f_bavail * found.f_frsize - leave
        if take > 0:
            # More than there is fails after having taken it all.
            with open(self.mount / "filler", "ab") as filler:
                end = filler.tell()
                while take >= 4096:
                    try:
                        os.posix_fallocate(filler.fileno(), end, take)
                        end += take
                        break
                    except OSError:
                        take //= 2
        return os.statvfs(self.mount).f_bavail * found.f_frsize

    def empty(self):
        (self.mount / "filler").unlink(missing_ok=True)

    def read_only(self):
        """As after an error of the disk: also for files that are open for writing, which a remount would refuse."""
        trigger = Path("/sys/fs/ext4") / Path(self.device).name / "trigger_fs_error"
        trigger.write_text("hosts")

    def close(self):
        self.thaw()
        for _ in range(100):
            if subprocess.run(["umount", str(self.mount)], capture_output=True).returncode == 0:
                break
            time.sleep(0.05)
        else:
            run("umount", "--lazy", self.mount)
        self.image.unlink(missing_ok=True)


def damage(path, offsets, length=64):
    """Turns bytes over in place, past every cache that is not the file system's own."""
    with open(path, "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            found = file.read(length)
            file.seek(offset)
            file.write(bytes(byte ^ 0xFF for byte in found))
