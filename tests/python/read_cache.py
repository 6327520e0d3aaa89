"""Reads a model as a pod does whose volume is its Hub cache: through huggingface_hub alone.

    python read_cache.py REPO COMMIT < FILES

HF_HUB_CACHE is the volume, HF_HUB_OFFLINE is set, FILES is a JSON object of path and sha256. Root reads
everything twice: the second time as a user without rights, where there is one.

Exits with 0 if every check passed.
"""

import hashlib
import json
import os
import socket
import sys
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

NOBODY = 65534


def same(what, got, expected):
    if got != expected:
        raise AssertionError(f"{what}: got {got!r}, expected {expected!r}")


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_alone():
    """There is no way to a network: what is read comes from the volume."""
    same("HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE, True)
    same("proxies", [name for name in os.environ if name.lower().endswith("_proxy")], [])
    # Loopback too, which is there and down.
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except ConnectionRefusedError:
        raise AssertionError("loopback is up") from None
    except OSError:
        pass


def check_revision(repo, revision, snapshot, files):
    """The model by one of its names: as a whole, a part of it, and file by file."""
    what = f"{repo} at {revision}"
    same(what, snapshot_download(repo, revision=revision), str(snapshot))
    part = snapshot_download(repo, revision=revision, allow_patterns=["*.json"])
    same(f"part of {what}", part, str(snapshot))
    for path, expected in files.items():
        file = hf_hub_download(repo, path, revision=revision)
        same(f"{path} of {what}", file, str(snapshot / path))
        same(f"bytes of {path} of {what}", digest(file), expected)
        same(f"{path} in the cache", try_to_load_from_cache(repo, path, revision=revision), file)
    same("absent file in the cache", try_to_load_from_cache(repo, "absent", revision=revision), None)
    try:
        hf_hub_download(repo, "absent", revision=revision)
    except LocalEntryNotFoundError:
        pass
    else:
        raise AssertionError("a file that there is not was downloaded")


def check_scan(repo, commit, snapshot, files):
    """The listing of the cache names this model, at this commit, with these files."""
    scan = scan_cache_dir()
    (found,) = scan.repos
    same("repo", (found.repo_id, found.repo_type), (repo, "model"))
    (revision,) = found.revisions
    same("revision", (revision.commit_hash, set(revision.refs)), (commit, {"main"}))
    paths = {str(file.file_path.relative_to(snapshot)) for file in revision.files}
    same("files of the listing", paths, set(files))
    same("incomplete files", set(scan.incomplete_files), set())
    # The volume's own mark beside the models is no model.
    warnings = [str(warning) for warning in scan.warnings if "/.weightd" not in str(warning)]
    same("warnings", warnings, [])


def check(repo, commit, files):
    folder = f"models--{repo.replace('/', '--')}"
    snapshot = Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit
    for revision in (None, "main", commit):
        check_revision(repo, revision, snapshot, files)
    check_scan(repo, commit, snapshot, files)


def is_user(uid):
    """Whether this user namespace has that user."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    ranges = [tuple(map(int, line.split())) for line in lines]
    return any(first <= uid < first + count for first, _, count in ranges)


def main(repo, commit):
    files = json.load(sys.stdin)
    check_alone()
    check(repo, commit, files)
    users = ["root" if os.geteuid() == 0 else "a user"]
    # Only now: the modules, all loaded by the first round, may be where nobody but root can read.
    if os.geteuid() == 0 and is_user(NOBODY):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        check(repo, commit, files)
        users.append("nobody")
    print(f"{len(files)} files by 3 revisions, offline, as {' and '.join(users)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
