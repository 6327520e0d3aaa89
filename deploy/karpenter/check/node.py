"""A node boots: the script of the node class runs in a namespace, its unit is checked and its commands do their work.

Run by check/run. Inside, /etc, /usr/local, /mnt and systemctl are ours; the rest is this machine's.
"""

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from common import check, run

import karpenter

INSIDE = "WEIGHTD_CHECK_INSIDE"
UNIT = Path("/etc/systemd/system/weightd-bootstrap.service")
ARRAY = Path("/mnt/k8s-disks/0")

FAKES = {
    "systemctl": 'echo "$@" >> "$WORK/systemctl"\n',
    # An image is a directory here.
    "nerdctl": 'echo "nerdctl $*" >> "$WORK/asked"\ncase "$*" in *login*) cat >> "$WORK/asked" ;; esac\n',
    "ctr": 'echo "ctr $*" >> "$WORK/asked"\ncase "$*" in\n*unmount*) ;;\n'
           '*mount*) mkdir -p "$6/usr/local/bin" && cp "$WEIGHTCTL" "$6/usr/local/bin/weightctl" ;;\nesac\n',
    "aws": 'echo "aws $*" >> "$WORK/asked"\ncase "$1" in ecr) echo pass-word ;; s3) cp "$WEIGHTCTL" "$5" ;; esac\n',
}


def enter():
    """This script again, with mounts of its own."""
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        karpenter.cloud_init(karpenter.merged(), work)
        command = ["unshare", "--mount", "--"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount", "--"]
        probe = run(*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt")
        if probe.returncode != 0:
            print(f"check: a node that boots: SKIPPED, no mounts of one's own: {probe.stderr.strip()}")
            return
        inside = subprocess.run([*command, sys.executable, __file__], env={**os.environ, INSIDE: str(work)}, timeout=600, check=False)
        sys.exit(inside.returncode)


def settings():
    """Keys of the unit and their values, all of each."""
    found = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def prepare(work):
    shutil.copy(ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt", work / "certificates")
    for path in ("/etc", "/usr/local", "/mnt"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    UNIT.parent.mkdir(parents=True)
    fakes = work / "fakes"
    fakes.mkdir()
    for name, body in FAKES.items():
        (fakes / name).write_text("#!/bin/sh\nset -eu\n" + body)
        (fakes / name).chmod(0o755)
    return {"PATH": f"{fakes}:/usr/bin:/bin:/usr/sbin:/sbin", "WORK": str(work), "WEIGHTCTL": os.environ["WEIGHTCTL"]}


def script(work, environment):
    (path,) = (work / "scripts").iterdir()
    for _ in range(2):
        ran = run(path, env=environment)
        check("the script runs, also again", ran.returncode == 0, ran.stderr)
    written = sorted(str(one) for top in ("/etc", "/usr/local") for one in Path(top).rglob("*") if one.is_file())
    check("what it writes", written == ["/etc/systemd/system/weightd-bootstrap.service", "/etc/weightd/bootstrap.env",
                                        "/etc/weightd/prefetch", "/usr/local/libexec/weightd-install"], written)
    asked = (work / "systemctl").read_text().splitlines()
    check("what it asks systemd", asked[:2] == ["daemon-reload", "enable --now --no-block weightd-bootstrap.service"], asked)
    check("the list", Path("/etc/weightd/prefetch").read_text() == "hf://org/model@main\n")


def install(environment):
    """The binary comes from an image, from a private registry, or from S3 if its hash is right."""
    work, to = Path(environment["WORK"]), Path("/usr/local/bin/weightctl")
    program = Path("/usr/local/libexec/weightd-install")
    digest = hashlib.sha256(Path(os.environ["WEIGHTCTL"]).read_bytes()).hexdigest()
    private = "1.dkr.ecr.eu-central-1.amazonaws.com/weightd:1"
    for source, sha256, good, words in [
        (common.VALUES["WEIGHTCTL"], "", True, ["nerdctl --namespace k8s.io pull", "ctr --namespace k8s.io images unmount --rm"]),
        (private, "", True, ["aws ecr get-login-password --region eu-central-1", "--password-stdin https://1.dkr", "pass-word"]),
        ("s3://bucket/weightctl", digest, True, ["aws s3 cp"]),
        ("s3://bucket/weightctl", "0" * 64, False, ["aws s3 cp"]),
    ]:
        to.unlink(missing_ok=True)
        (work / "asked").write_text("")
        ran = run(program, env={**environment, "WEIGHTD_FROM": source, "WEIGHTD_SHA256": sha256})
        asked = (work / "asked").read_text()
        check(f"install from {source}", (ran.returncode == 0) == good and to.exists() == good, ran)
        check(f"install from {source}: nothing is left over", sorted(os.listdir("/usr/local/bin")) == ["weightctl"] * good)
        for word in words:
            check(f"install from {source}: {word}", word in asked, asked)
        if source != private:
            check("a password goes to private registries only", "login" not in asked, asked)
    (work / "asked").write_text("")
    run(program, env={**environment, "WEIGHTD_FROM": private})
    to.unlink(missing_ok=True)
    run(program, env={**environment, "WEIGHTD_FROM": private})
    before = (work / "asked").read_text()
    run(program, env={**environment, "WEIGHTD_FROM": private})
    check("what is there is not fetched again", (work / "asked").read_text() == before)


def unit():
    verified = run("systemd-analyze", "verify", UNIT)
    check("systemd-analyze verify", verified.returncode == 0 and not verified.stderr.strip(), verified.stderr)
    found = settings()
    check("after nodeadm", "nodeadm-run.service" in found["After"][0], found["After"])
    check("it does not block boot", found["Type"] == ["exec"], found["Type"])
    rated = run("systemd-analyze", "security", "--offline=true", "--threshold=30", UNIT)
    check("systemd-analyze security: at most 3.0", rated.returncode == 0, rated.stdout[-200:] + rated.stderr)
    print("check:", rated.stdout.strip().splitlines()[-1].strip("→ ") if rated.stdout else "")


def members(name):
    """The system calls of one of systemd's sets."""
    found = set()
    for line in run("systemd-analyze", "syscall-filter", name).stdout.splitlines()[1:]:
        word = line.strip()
        if word.startswith("@"):
            found |= members(word)
        elif word and not word.startswith("#"):
            found.add(word)
    return found


def calls(trace):
    """What the program asks the kernel for is what the unit allows."""
    made = set(re.findall(r"^\d+\s+(?:<\.\.\. )?(\w+)(?:\(| resumed)", trace, re.MULTILINE))
    allowed = members("@system-service") | members("@default")
    filters = settings()["SystemCallFilter"]
    check("the unit's filter is the one that is checked", filters == ["@system-service", "~@privileged"], filters)
    check("system calls were seen", len(made) > 30, made)
    check("no system call that the unit forbids", made <= allowed and not made & members("@privileged"), made - allowed)


def work_of_unit(environment):
    """The unit's command, as root without capabilities: before the array is there, and with it."""
    (command,) = settings()["ExecStart"]
    words = command.split()
    model = Path(environment["WORK"]) / "model"
    generate = [os.environ["STANDIN"], "generate", "--root", model, "--shards", "2", "--bytes-per-shard", "3000000"]
    subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
    hub = subprocess.Popen([os.environ["STANDIN"], "hub", "--repo", f"org/model={model}"], stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, text=True)
    try:
        endpoint = json.loads(hub.stdout.readline())["endpoint"]
        environment = {**environment, "HF_ENDPOINT": endpoint, "AWS_EC2_METADATA_DISABLED": "true",
                       "SSL_CERT_FILE": str(Path(environment["WORK"]) / "certificates")}
        bare = ["setpriv", "--bounding-set=-all", "--no-new-privs", "--"]
        ARRAY.mkdir(parents=True)
        soon = run(*bare, *words, "--timeout", "1s", env=environment)
        check("without an array it ends well", soon.returncode == 0 and "no file system" in soon.stderr, soon)
        check("and writes nothing", not list(ARRAY.iterdir()), list(ARRAY.iterdir()))
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(ARRAY)], check=True)
        trace = Path(environment["WORK"]) / "trace"
        traced = ["strace", "-f", "-qq", "-o", trace] if shutil.which("strace") else []
        done = run(*bare, *traced, *words, "--strict", "--output", "json", env=environment)
        if traced:
            calls(trace.read_text())
        check("with it, it fetches", done.returncode == 0, done)
        if done.returncode == 0:
            ready = json.loads(done.stdout)
            tree = Path(ready["path"])
            theirs = {one.name: hashlib.sha256(one.read_bytes()).digest() for one in model.rglob("*.safetensors")}
            ours = {one.name: hashlib.sha256(one.read_bytes()).digest() for one in tree.rglob("*.safetensors")}
            check("into the array", tree.is_relative_to(ARRAY / "weightd") and ours == theirs, ready)
    finally:
        hub.stdin.close()
        hub.wait()


def main():
    work = os.environ.get(INSIDE)
    if not work:
        enter()
        common.finish("a node that boots")
        return
    work = Path(work)
    environment = prepare(work)
    script(work, environment)
    install(environment)
    shutil.copy(os.environ["WEIGHTCTL"], "/usr/local/bin/weightctl")
    unit()
    work_of_unit(environment)
    common.finish("a node that boots")


if __name__ == "__main__":
    main()
