"""The unit of the node class under a real systemd, with all its sandbox: it boots in namespaces, on a copy of this machine's files.

Run by check/run. Needs root.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import common
from common import KARPENTER, check, objects, text_of

# The array is a tmpfs; the install script says that it was called.
BOOT = r"""
set -e
mount -t tmpfs tmpfs "$WORK/disk"
mkdir "$WORK/disk/upper" "$WORK/disk/work" "$WORK/disk/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$WORK/disk/upper,workdir=$WORK/disk/work" "$WORK/disk/root"
cd "$WORK/disk/root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p mnt/k8s-disks/0 out etc/weightd usr/local/libexec
mount --bind "$WORK/out" out
if [ "$ARRAY" = yes ]; then mount -t tmpfs tmpfs mnt/k8s-disks/0; fi
rm -rf etc/systemd/system/*.wants
cp "$WORK/unit" etc/systemd/system/weightd-bootstrap.service
mkdir etc/systemd/system/weightd-bootstrap.service.d
cp "$WORK/drop-in" etc/systemd/system/weightd-bootstrap.service.d/check.conf
cp "$WORK/target" etc/systemd/system/check.target
printf '#!/bin/sh\ntouch /out/installed\n' > usr/local/libexec/weightd-install
cp "$WEIGHTCTL" usr/local/bin/weightctl
chmod +x usr/local/libexec/weightd-install usr/local/bin/weightctl
echo hf://org/model > etc/weightd/prefetch
echo "HF_ENDPOINT=$ENDPOINT" > etc/weightd/bootstrap.env
exec chroot . /usr/bin/env -i container=other PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --system --unit=check.target --show-status=0
"""
# Nothing else of this machine is to start; what the unit says is to be seen.
DROP_IN = """[Unit]
DefaultDependencies=no

[Service]
StandardOutput=append:/out/stdout
StandardError=append:/out/stderr
"""
TARGET = """[Unit]
DefaultDependencies=no
Wants=weightd-bootstrap.service
"""


def unit():
    (node_class,) = objects(text_of(KARPENTER / "ec2nodeclass-al2023.yaml"))
    found = re.search(r"weightd-bootstrap\.service <<'END'\n(.*?\n)END\n", node_class["spec"]["userData"], re.DOTALL)
    return found.group(1).replace(" --wait-for ", " --timeout 2s --wait-for ").replace("Wants=network-online.target\n", "")


def boot(endpoint, array):
    """What the unit printed and said; None if it never began."""
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for name in ("disk", "out"):
            (work / name).mkdir()
        for name, text in {"unit": unit(), "drop-in": DROP_IN, "target": TARGET}.items():
            (work / name).write_text(text)
        environment = {**os.environ, "WORK": str(work), "ENDPOINT": endpoint, "ARRAY": "yes" if array else "no"}
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--propagation", "private", "--", "sh", "-c", BOOT]
        with (work / "log").open("w") as log:
            running = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            try:
                return wait(work, running)
            finally:
                running.kill()
                running.wait()


def wait(work, running):
    stdout, stderr = work / "out" / "stdout", work / "out" / "stderr"
    for _ in range(120):
        time.sleep(0.25)
        said = stderr.read_text() if stderr.exists() else ""
        printed = stdout.read_text() if stdout.exists() else ""
        if "ready" in printed or "boots on" in said or running.poll() is not None:
            break
    if not (work / "out" / "installed").exists():
        print("check: the unit under systemd: SKIPPED, it does not boot here:", (work / "log").read_text()[-300:])
        return None
    return printed, said


def main():
    if os.geteuid() != 0:
        print("check: the unit under systemd: SKIPPED, not root")
        return
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        generate = [os.environ["STANDIN"], "generate", "--root", model, "--shards", "2", "--bytes-per-shard", "3000000"]
        subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
        serve = [os.environ["STANDIN"], "hub", "--repo", f"org/model={model}"]
        hub = subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            endpoint = json.loads(hub.stdout.readline())["endpoint"]
            for array, words in [(True, ["hf://org/model@", ": ready, "]), (False, ["no file system is mounted there", "boots on"])]:
                found = boot(endpoint, array)
                if found is None:
                    return
                said = "".join(found)
                check(f"under systemd, array: {array}", all(word in said for word in words), said)
        finally:
            hub.stdin.close()
            hub.wait()
    common.finish("the unit under systemd")


if __name__ == "__main__":
    main()
