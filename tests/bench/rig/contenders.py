"""Who downloads: how each is told to bring one model to a directory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from . import setup
from .origin import BUCKET


@dataclass
class Job:
    """One run: where the model is, where it goes, and what the contender may know."""

    out: Path
    home: Path
    environment: dict
    urls: dict
    tools: dict
    connections: int = 64


@dataclass
class Contender:
    name: str
    sources: set
    # Makes the tool's path, installing it if need be.
    tool: Callable
    command: Callable
    # Looks after each byte's SHA-256, so that it is no peer "that verifies nothing".
    verifies: bool = False
    environment: dict = field(default_factory=dict)


def ours(source):
    model = {"s3": f"s3://{BUCKET}/model", "hub": f"hf://org/{BUCKET}"}[source]

    def command(job):
        weightctl = [job.tools["weightd"] / "weightctl", "--root", job.out / "store"]
        return [*weightctl, "--output", "json", "prefetch", model, "--include", "*"]

    return command


def s5cmd(*options):
    def command(job):
        start = [job.tools["s5cmd"], "--endpoint-url", job.environment["AWS_ENDPOINT_URL_S3"], "--log", "error"]
        return [*start, "cp", *options, f"s3://{BUCKET}/model/*", f"{job.out}/"]

    return command


def aws(job):
    source = f"s3://{BUCKET}/model/"
    return [job.tools["aws"] / "aws", "s3", "cp", "--recursive", "--only-show-errors", source, job.out]


def aws_crt(job):
    return [job.tools["aws-crt"] / "python", setup.PEERS / "crt.py", BUCKET, "model/", job.out]


def rclone(job):
    options = ["--s3-provider", "Other", "--s3-env-auth", "--s3-force-path-style", "--s3-no-check-bucket", "--s3-list-version", "2"]
    options += ["--s3-endpoint", job.environment["AWS_ENDPOINT_URL_S3"], "--config", "/dev/null"]
    return [job.tools["rclone"], "copy", *options, "--transfers", "16", f":s3:{BUCKET}/model", job.out]


def curl(job):
    """curl and then sha256sum: what people do who want the bytes checked."""
    config = job.home / "curl.config"
    files = (f'url = "{url}"\noutput = "{job.out}/{path}"\n' for path, url in job.urls.items())
    config.write_text("".join(files))
    fetch = f"curl --parallel --parallel-max {job.connections} --fail --no-progress-meter --create-dirs --config {config}"
    check = f"find {job.out} -type f -print0 | xargs -0 -P 4 -n 1 sha256sum >/dev/null"
    return ["sh", "-c", f"{fetch} && {check}"]


def hf(tool):
    def command(job):
        return [job.tools[tool] / "hf", "download", "--quiet", f"org/{BUCKET}", "--local-dir", job.out]

    return command


HF = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def contenders():
    def aws_venv(target):
        return setup.venv(target, "aws")

    return [
        Contender("weightd", {"s3"}, None, ours("s3"), verifies=True),
        Contender("s5cmd", {"s3"}, setup.s5cmd, s5cmd()),
        Contender("s5cmd-tuned", {"s3"}, setup.s5cmd, s5cmd("--concurrency", "16", "--part-size", "16")),
        Contender("aws", {"s3"}, aws_venv, aws),
        Contender("aws-crt", {"s3"}, aws_venv, aws_crt),
        Contender("rclone", {"s3"}, setup.rclone, rclone),
        Contender("curl", {"s3"}, None, curl, verifies=True),
        Contender("weightd", {"hub"}, None, ours("hub"), verifies=True),
        Contender("hf", {"hub"}, lambda target: setup.venv(target, "hf"), hf("hf"), environment=HF),
        Contender(
            "hf_transfer", {"hub"}, lambda target: setup.venv(target, "hf-transfer"), hf("hf_transfer"),
            environment={**HF, "HF_HUB_ENABLE_HF_TRANSFER": "1"},
        ),
    ]
