"""Proves that real clients take the stand-ins for the real thing.

Serves a generated model with `weightd-standin` and downloads it with `huggingface_hub`, with and
without `hf_xet`, and with `boto3`. Needs the packages in requirements.txt.

    python hub_fidelity.py [path of weightd-standin; else $WEIGHTD_STANDIN]

Exits with 0 if every check passed.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

SHARD_BYTES = 25_000_000  # more than one of the client's 10 MiB chunks
GOOD, GRANTED = "hf_good", "hf_granted"


def standin(binary, *arguments):
    """Starts an origin; returns the process and what it printed."""
    process = subprocess.Popen(
        [binary, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{binary} {arguments[0]} ended with {process.wait()}")
    return process, json.loads(line)


@contextlib.contextmanager
def running(binary, *arguments):
    process, endpoints = standin(binary, *arguments)
    try:
        yield endpoints
    finally:
        process.stdin.close()
        if process.wait(timeout=10) != 0:
            raise RuntimeError(f"{arguments[0]} ended with {process.returncode}")


def digests(root):
    """sha256 of every file under a directory, but for what the client keeps for itself."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file() and ".cache" not in path.relative_to(root).parts
    }


def same(what, got, expected):
    if got != expected:
        raise AssertionError(f"{what}: got {got!r}, expected {expected!r}")


def raises(what, kind, call):
    try:
        call()
    except Exception as error:  # whichever it is, its class is what is checked
        same(what, type(error).__name__, kind)
    else:
        raise AssertionError(f"{what}: no {kind}")


def hf_download(endpoint, root, work, name, **environment):
    """Runs the command line client in a cache of its own."""
    target = work / name
    base = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    base |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(work / f"{name}-home")}
    base["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    hf = Path(sys.executable).with_name("hf")
    command = [hf, "download", "org/model", "--local-dir", target]
    subprocess.run(command, env=base | environment, check=True, stdout=subprocess.DEVNULL)
    same(name, digests(target), digests(root))


def requests(endpoint):
    import urllib.request

    with urllib.request.urlopen(f"{endpoint}/_standin/requests") as answer:
        return json.load(answer)


def check_downloads(endpoint, roots, work):
    import hf_xet  # noqa: F401  without it the second download would prove nothing

    hf_download(endpoint, roots["main"], work, "without-xet", HF_HUB_DISABLE_XET="1")
    hf_download(endpoint, roots["main"], work, "with-xet", HF_HUB_DISABLE_XET="0")
    hf_download(endpoint, roots["main"], work, "with-token", HF_TOKEN=GOOD)
    log = requests(endpoint)
    same("tokens at the CDN", [r for r in log if r["origin"] == "cdn" and r["authorization"]], [])
    tokens = {r["authorization"] for r in log if r["origin"] == "hub"}
    same("tokens at the hub", tokens, {None, f"Bearer {GOOD}"})
    pages = [r for r in log if "/tree/" in r["path"] and "cursor=" in r["query"]]
    if not pages:
        raise AssertionError("the tree was never asked for a second page")


def check_revisions(roots, work):
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    refs = api.list_repo_refs("org/model", include_pull_requests=True)
    same("branches", [ref.name for ref in refs.branches], ["main"])
    same("tags", [ref.name for ref in refs.tags], ["v1"])
    same("pulls", [ref.ref for ref in refs.pull_requests], ["refs/pr/1"])
    commits = {"main": refs.branches[0], "v1": refs.tags[0], "refs/pr/1": refs.pull_requests[0]}
    for revision, root in roots.items():
        target = work / revision.replace("/", "-")
        snapshot_download("org/model", revision=revision, local_dir=target)
        same(revision, digests(target), digests(root))
        sha = api.model_info("org/model", revision=revision).sha
        same(f"sha of {revision}", sha, commits[revision].target_commit)
        by_sha = snapshot_download("org/model", revision=sha)
        same(f"{revision} by sha", digests(by_sha), digests(root))
    snapshot_download("ownerless", local_dir=work / "ownerless")
    same("ownerless", digests(work / "ownerless"), digests(roots["main"]))


def check_listing(root):
    from huggingface_hub import HfApi

    api = HfApi()
    expected = digests(root)
    listed = {entry.path: entry for entry in api.list_repo_tree("org/model", recursive=True)}
    files = {path: entry for path, entry in listed.items() if hasattr(entry, "blob_id")}
    same("paths of the tree", sorted(files), sorted(expected))
    for path, entry in files.items():
        same(f"size of {path}", entry.size, (root / path).stat().st_size)
        if entry.lfs:
            same(f"sha256 of {path}", entry.lfs.sha256, expected[path])
        else:
            content = (root / path).read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            same(f"blob of {path}", entry.blob_id, blob)
    info = api.model_info("org/model", files_metadata=True)
    hashes = {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}
    weights = {path: sha for path, sha in expected.items() if path.endswith(".safetensors")}
    same("lfs of the siblings", hashes, weights)
    found = api.get_paths_info("org/model", ["config.json", "absent"])
    same("paths-info", [entry.path for entry in found], ["config.json"])


def check_errors(work):
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi(token=False)

    def download(repo, file="config.json", token=False, revision=None):
        cache = tempfile.mkdtemp(dir=work)
        return lambda: hf_hub_download(
            repo, file, token=token, revision=revision, cache_dir=cache
        )

    for what, kind, call in [
        ("absent repo", "RepositoryNotFoundError", download("org/absent")),
        ("absent repo, token", "RepositoryNotFoundError", download("org/absent", token=GOOD)),
        ("private repo", "RepositoryNotFoundError", download("org/private")),
        ("private repo, token", "RepositoryNotFoundError", download("org/private", token=GOOD)),
        ("gated repo", "GatedRepoError", download("org/gated")),
        ("gated repo, token", "GatedRepoError", download("org/gated", token=GOOD)),
        # Asked of the API, because a download hides these two behind LocalEntryNotFoundError.
        ("disabled repo", "DisabledRepoError", lambda: api.model_info("org/disabled")),
        ("bad token", "HfHubHTTPError", lambda: api.model_info("org/model", token="hf_bad")),
        ("absent revision", "RevisionNotFoundError", download("org/model", revision="absent")),
        ("absent file", "RemoteEntryNotFoundError", download("org/model", "absent.json")),
    ]:
        raises(what, kind, call)
    for repo in ("org/gated", "org/private"):
        Path(download(repo, token=GRANTED)()).read_bytes()
    # The metadata of a gated repo can be read by all.
    same("gated", api.model_info("org/gated").gated, "auto")


def check_hub(binary, roots, work):
    main = roots["main"]
    repos = ["model", "gated", "private", "disabled"]
    arguments = [f"--repo=org/{name}={main}" for name in repos]
    arguments += [f"--repo=ownerless={main}", f"--repo=org/model@refs/pr/1={roots['refs/pr/1']}"]
    arguments += ["--tag=org/model@v1", "--gated=org/gated", "--private=org/private"]
    arguments += ["--disabled=org/disabled", f"--token={GOOD}", "--page-size=3"]
    arguments += [f"--grant=org/{name}={GRANTED}" for name in ("gated", "private")]
    with running(binary, "hub", *arguments) as endpoints:
        endpoint = endpoints["endpoint"]
        # Read once, when huggingface_hub is imported.
        os.environ |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(work / "home"),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        yield "downloads", lambda: check_downloads(endpoint, roots, work)
        yield "revisions", lambda: check_revisions(roots, work)
        yield "listing", lambda: check_listing(main)
        yield "errors", lambda: check_errors(work)


def check_s3(binary, root, work):
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    buckets = work / "buckets"
    buckets.mkdir()
    (buckets / "models").symlink_to(root)
    with running(binary, "s3", f"--root={buckets}") as endpoints:
        def client(secret):
            return boto3.client(
                "s3",
                endpoint_url=endpoints["endpoint"],
                aws_access_key_id=endpoints["access_key"],
                aws_secret_access_key=secret,
                region_name="us-east-1",
                config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
            )

        s3 = client(endpoints["secret_key"])
        pages = s3.get_paginator("list_objects_v2").paginate(
            Bucket="models", PaginationConfig={"PageSize": 2}
        )
        listed = {item["Key"]: item for page in pages for item in page["Contents"]}
        expected = digests(root)
        same("keys", sorted(listed), sorted(expected))
        for key, item in listed.items():
            got = s3.get_object(Bucket="models", Key=key, IfMatch=item["ETag"])
            same(key, hashlib.sha256(got["Body"].read()).hexdigest(), expected[key])
        part = s3.get_object(Bucket="models", Key="config.json", Range="bytes=1-3")
        same("range", part["Body"].read(), (root / "config.json").read_bytes()[1:4])
        s3.put_object(Bucket="models", Key="a b+c", Body=b"put", Metadata={"who": "me"})
        put = s3.get_object(Bucket="models", Key="a b+c", ChecksumMode="ENABLED")
        same("put", (put["Body"].read(), put["Metadata"]), (b"put", {"who": "me"}))
        same("checksum type", put["ChecksumType"], "FULL_OBJECT")
        for what, code, call in [
            ("changed", "PreconditionFailed", lambda: s3.get_object(
                Bucket="models", Key="config.json", IfMatch='"0"')),
            ("absent", "NoSuchKey", lambda: s3.get_object(Bucket="models", Key="absent")),
            ("no bucket", "NoSuchBucket", lambda: s3.list_objects_v2(Bucket="absent")),
            ("past the end", "InvalidRange", lambda: s3.get_object(
                Bucket="models", Key="a b+c", Range="bytes=3-")),
            ("bad key", "SignatureDoesNotMatch", lambda: client("bad").list_buckets()),
        ]:
            try:
                call()
            except ClientError as error:
                same(what, error.response["Error"]["Code"], code)
            else:
                raise AssertionError(f"{what}: no {code}")


def generate(binary, root, seed):
    arguments = ["--seed", str(seed), "--shards", "2", "--bytes-per-shard", str(SHARD_BYTES)]
    command = [binary, "generate", "--root", root, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (root / "sub").mkdir()
    (root / "sub" / "a file.txt").write_text(f"in a folder, seed {seed}\n")


def main():
    binary = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("WEIGHTD_STANDIN")
    if not binary:
        sys.exit(__doc__)
    binary = str(Path(binary).resolve())
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        generate(binary, work / "model-main", 1)
        generate(binary, work / "model-pr", 2)
        roots = {"main": work / "model-main", "v1": work / "model-main"}
        roots["refs/pr/1"] = work / "model-pr"
        # Lazily: each check has to run while the origin it was made for does.
        for name, check in check_hub(binary, roots, work):
            failed += not passed(name, check)
        failed += not passed("s3", lambda: check_s3(binary, roots["main"], work))
    sys.exit(1 if failed else 0)


def passed(name, check):
    try:
        check()
    except Exception:
        traceback.print_exc()
        print(f"FAILED {name}")
        return False
    print(f"ok {name}")
    return True


if __name__ == "__main__":
    main()
