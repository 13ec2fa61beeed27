"""A small stand-in for the server of Weights & Biases: what one run sends, kept in memory, on loopback.

It answers what the client asks for when it starts a run, sends numbers and files, ends a run, and goes on with one. The
real server does far more; no test here is about that.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40


class Run:
    """What has been sent of one run."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.config = "{}"
        self.name = ""
        self.exit_code: int | None = None
        self.files: set[str] = set()

    def rows(self) -> list[dict[str, Any]]:
        """The history, oldest first."""
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]


class Server:
    """The stand-in; may be stopped and started again on the same port, and remembers.

    Attributes:
        silent: it answers, but does nothing that it is asked to.
        runs: by their id.
        operations: names of the requests, in order.
    """

    def __init__(self) -> None:
        self.silent = False
        self.runs: dict[str, Run] = {}
        self.operations: list[str] = []
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Server":
        handler = type("Handler", (_Handler,), {"state": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Refuse connections from here on, and close those there are."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def up(self) -> bool:
        return self._server is not None

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found[1] if found else ""
        self.operations.append(operation)
        entity = {"id": "e", "name": "someone", "username": "someone"}
        project = {"id": "p", "name": "ostinato", "entity": entity}
        if operation == "Viewer":
            return {"viewer": {**entity, "entity": "someone", "flags": "{}", "teams": {"edges": []}}}
        if operation == "UpsertBucket":
            name = variables["name"]
            new = name not in self.runs
            run = self.runs.setdefault(name, Run())
            run.config = variables.get("config") or run.config
            run.name = variables.get("displayName") or run.name
            bucket = {"id": name, "name": name, "displayName": run.name, "config": run.config, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "p", "name": "ostinato", "entity": entity, "bucket": self._status(variables)}}
        if operation == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def _status(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(variables["name"])
        if run is None:
            return None
        history = run.lines.get("wandb-history.jsonl", [])
        return {
            "id": variables["name"],
            "name": variables["name"],
            "wandbConfig": '{"t": 1}',
            "config": run.config,
            "summaryMetrics": history[-1] if history else "{}",
            "historyLineCount": len(history),
            "eventsLineCount": len(run.lines.get("wandb-events.jsonl", [])),
            "logLineCount": len(run.lines.get("output.log", [])),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": "[]",
        }

    def stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.runs.setdefault(name, Run())
        for file, part in (body.get("files") or {}).items():
            lines = run.lines.setdefault(file, [])
            lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    state: Server
    protocol_version = "HTTP/1.1"

    def _answer(self, value: Any, code: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")  # so that a stopped server is not talked to any more
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body = self._body()
        if not self.state.up:
            return
        if self.state.silent:
            self._answer({}, 503)
            return
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            self._answer({"data": self.state.graphql(asked["query"], asked.get("variables") or {})})
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.state.stream(found[1], json.loads(body))
            self._answer({})
        else:
            self._answer({}, 404)

    def do_PUT(self) -> None:
        self._body()
        if self.state.up:
            self._answer({})

    def do_GET(self) -> None:
        self._answer({}, 404)

    def do_HEAD(self) -> None:
        self._answer({}, 404)

    def log_message(self, *_: Any) -> None:
        pass
