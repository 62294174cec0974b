"""An S3 server on loopback (moto's) for tests, which can be told to fail: busy answers, and answers cut off."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import boto3
from werkzeug import Request


class S3Server:
    """Context manager: a server with a port of its own and one empty bucket. One at a time in a process."""

    bucket = "corpus"

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[list[Any]] = []  # which requests match, how many times, status (None: cut off), after bytes
        self.lock = threading.Lock()

    def __enter__(self) -> S3Server:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        # by HTTP/1.0 every upload waits a second for leave to send its body
        quiet: Any = type("Quiet", (WSGIRequestHandler,), {"protocol_version": "HTTP/1.1", "log": lambda *_: None})
        self.application = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=quiet)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.empty()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def connect(self, monkeypatch: Any, *, block_bytes: int | None = None) -> None:
        """Makes this process, and its children, talk to the server, this one without waiting between tries."""
        for name, value in {"S3_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": "test",
                            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
                            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}.items():
            monkeypatch.setenv(name, value)
        for module in ("botocore.endpoint", "ettin_foundry.data.storage"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=lambda seconds: None))
        if block_bytes:
            monkeypatch.setattr("ettin_foundry.data.storage._BLOCK_BYTES", block_bytes)

    def empty(self) -> None:
        """Back to one empty bucket, no faults, no requests."""
        self.clear()
        reset = urllib.request.Request(f"{self.endpoint}/moto-api/reset", method="POST")  # its state outlives a server
        urllib.request.urlopen(reset).close()
        self.client.create_bucket(Bucket=self.bucket)
        self.clear()

    @functools.cached_property  # slow to make
    def client(self) -> Any:
        session = boto3.Session(aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
        return session.client("s3", endpoint_url=self.endpoint)

    def url(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{key}".rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Content of all objects by what follows the prefix in their keys."""
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)["Contents"]  # of 1,000 at most
        return {entry["Key"].removeprefix(prefix): self.client.get_object(Bucket=self.bucket, Key=entry["Key"])[
            "Body"].read() for entry in found}

    def fail(self, matches: Callable[[Request], bool], *, times: int = 1, status: int = 503) -> None:
        """The next `times` requests that match get this status, and nothing is done."""
        self.faults.append([matches, times, status, 0])

    def cut(self, matches: Callable[[Request], bool], *, times: int = 1, after: int = 1000) -> None:
        """The next `times` answers that match promise all their bytes; the connection is lost after `after` of them."""
        self.faults.append([matches, times, None, after])

    def faults_left(self) -> int:
        return sum(fault[1] for fault in self.faults)

    def clear(self) -> None:
        self.faults.clear()
        self.requests.clear()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        request = Request(environ)
        with self.lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault[1] and fault[0](request)), None)
            if fault:
                fault[1] -= 1
        if fault and fault[2]:
            start_response(f"{fault[2]} Injected", [("Content-Length", "0")])
            return
        body = self.application(environ, start_response)
        if not fault:
            yield from body
            return
        yield b"".join(body)[:fault[3]]
        with contextlib.suppress(OSError):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError("injected")
