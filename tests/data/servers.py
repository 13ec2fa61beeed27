"""Servers on loopback for tests of remote shards: nginx, the S3 API of moto, and a proxy that misbehaves on demand."""

import contextlib
import http.client
import http.server
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def find_nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """A real nginx that serves a folder; its access log is `access` in the other folder.

    Yields:
        host and port.
    """
    program = find_nginx()
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"""{user} daemon off; master_process off; pid {folder}/pid; error_log {folder}/error;
        events {{}}
        http {{
            log_format asked '$request_method $uri $status "$http_range" $body_bytes_sent';
            access_log {folder}/access asked;
            client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
            uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
            server {{ listen 127.0.0.1:{port}; root {root}; }}
        }}"""
    )
    process = subprocess.Popen([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.PIPE)
    try:
        wait_for_port(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


def wait_for_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass
class Fault:
    """What the proxy does to one answer."""

    status: int | None = None
    """Answer so, without asking the server."""
    cut: int | None = None
    """End the connection after so many bytes of the content."""
    then: Callable[[], Any] | None = None
    """Called at that point."""


@dataclass
class Proxy:
    """Hands requests on to a server; those for a tar meet the faults first, one each."""

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each request for a tar."""
    password: str | None = None
    """Wanted in each request, as HTTP's Basic has it."""
    address: str = ""

    @contextlib.contextmanager
    def running(self) -> Iterator["Proxy"]:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.block_on_close = False
        self.address = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        fault = Fault()
        if self.password and self.password not in handler.headers.get("Authorization", ""):
            fault = Fault(status=401)
        elif ".tar" in handler.path:
            self.asked.append((handler.path, handler.headers.get("Range")))
            fault = self.faults.pop(0) if self.faults else fault
        if fault.status:
            handler.send_response(fault.status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=20)
        connection.request("GET", handler.path, headers=dict(handler.headers))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date", "content-length"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: fault.cut])
        if fault.then:
            handler.wfile.flush()
            fault.then()
        if fault.cut is not None:
            handler.wfile.flush()
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)


class Bucket:
    """A bucket of moto's S3 server."""

    def __init__(self, address: str) -> None:
        import botocore.session

        self.address = address
        self.client = botocore.session.Session().create_client(
            "s3",
            endpoint_url=f"http://{address}",
            aws_access_key_id="x",
            aws_secret_access_key="x",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket="speech")

    def put(self, name: str, content: bytes, acl: str = "private") -> None:
        self.client.put_object(Bucket="speech", Key=name, Body=content, ACL=acl)


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The S3 API on loopback; host and port."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed (extra dev)")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"{host}:{port}"
    finally:
        server.stop()
