"""The origin: nginx answers for the bytes, the stand-ins behind it for lists, metadata and redirects."""

import contextlib
import json
import socket
import subprocess
import time

# In a network namespace of our own, ports are ours to choose.
S3, HUB, CDN, SLOW = 8001, 8002, 8003, 8004
BUCKET = "bench"

CONFIG = """
daemon off;
{user}
worker_processes auto;
worker_rlimit_nofile 65536;
pid {work}/nginx.pid;
error_log {work}/nginx.log warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  default_type application/octet-stream;
  client_body_temp_path {work}/nginx-body;
  proxy_temp_path {work}/nginx-proxy;
  fastcgi_temp_path {work}/nginx-1; uwsgi_temp_path {work}/nginx-2; scgi_temp_path {work}/nginx-3;
  sendfile on; tcp_nopush on; tcp_nodelay on;
  keepalive_timeout 300s; keepalive_requests 1000000;
  open_file_cache max=20000 inactive=1h; open_file_cache_valid 1h;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Host $http_host;
  upstream s3 {{ server {s3}; keepalive 64; }}
  upstream hub {{ server {hub}; keepalive 64; }}
  # An object's bytes or headers; everything else is a question for the S3 server.
  map "$request_method?$args" $is_object {{
    default 0;
    "~^(GET|HEAD)\\?(x-id=(GetObject|HeadObject))?$" 1;
  }}
  server {{
    listen {s3_port} backlog=4096;
    listen {slow_port} backlog=4096;
    error_page 418 = @s3;
    location / {{ return 418; }}
    location ~ ^/(?<bucket>[^/]+)/model/(?<key>.+)$ {{
      if ($is_object = 0) {{ return 418; }}
      set $rate 0;
      if ($server_port = {slow_port}) {{ set $rate {slow_rate}; }}
      limit_rate $rate;
      alias {data}/$bucket/$key;
    }}
    location @s3 {{ proxy_pass http://s3; }}
  }}
  server {{
    listen {hub_port} backlog=4096;
    location / {{
      proxy_pass http://hub;
      proxy_redirect {cdn}/ http://$host:{cdn_port}/;
    }}
  }}
  server {{
    listen {cdn_port} backlog=4096;
    location ~ ^/repos/org/(?<model>[^/]+)/[0-9a-f]+/(?<file>.+)$ {{ alias {data}/$model/$file; }}
  }}
}}
"""


class Origin:
    """Serves `data/<bucket>/…` as `s3://<bucket>/model/…` and as `hf://org/<bucket>` while its `with` block runs."""

    def __init__(self, nginx, binaries, work, data, slow_bytes_per_second=25_000_000):
        self.nginx, self.binaries, self.work, self.data = nginx, binaries, work, data
        self.slow_rate = slow_bytes_per_second

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            behind = subprocess.Popen([self.binaries / "weightd-bench", "origin", self.data], **pipes)
            undo.callback(stop, behind)
            self.standin = json.loads(behind.stdout.readline())
            config = self.work / "nginx.conf"
            config.write_text(self.config())
            command = [self.nginx, "-e", self.work / "nginx.log", "-p", self.work, "-c", config]
            front = subprocess.Popen(command)
            undo.callback(stop, front)
            wait_for_port(front, S3)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *_):
        self.undo.close()

    def config(self):
        address = {name: self.standin[name].removeprefix("http://") for name in ("s3", "hub")}
        ports = {"s3_port": S3, "slow_port": SLOW, "hub_port": HUB, "cdn_port": CDN}
        return CONFIG.format(
            work=self.work, data=self.data, cdn=self.standin["cdn"], slow_rate=self.slow_rate,
            user="user root;", **address, **ports,
        )

    def environment(self, host="127.0.0.1", s3_port=S3):
        """How every client finds the origin and is let in."""
        endpoint = f"http://{host}:{s3_port}"
        return {
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.standin["access_key"],
            "AWS_SECRET_ACCESS_KEY": self.standin["secret_key"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "HF_ENDPOINT": f"http://{host}:{HUB}",
        }

    def urls(self, host="127.0.0.1", s3_port=S3):
        """Addresses of all objects, by path."""
        root = self.data / BUCKET
        paths = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        return {path: f"http://{host}:{s3_port}/{BUCKET}/model/{path}" for path in paths}


def wait_for_port(process, port):
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args[0]} does not listen on port {port}")
        time.sleep(0.01)


def stop(process):
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
