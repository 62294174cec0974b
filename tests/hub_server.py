"""A Hub in this process, as far as an upload of a model asks it: `with HubServer() as hub`."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class HubServer(ThreadingHTTPServer):
    """Of one repository, me/it: commits, [{path: content}] of whole trees, and tags, {name: number of a commit}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.asked, self.refused = f"http://127.0.0.1:{self.server_port}", [], -1
        self.commits: list[dict[str, bytes]] = []
        self.tags: dict[str, int] = {}
        Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, lines: list[Any]) -> Any:
        self.asked.append(path)
        what = path.split("?")[0].removeprefix("/api/").removeprefix("models/me/it/")
        if what == "preupload/main":
            return {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]]}
        if what == "commit/main" and len(self.commits) != self.refused:
            new = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
            self.commits.append({**(self.commits or [{}])[-1], **new})
            return {"success": True, "commitOid": f"{len(self.commits) - 1:040x}", "commitUrl": f"{self.url}/x"}
        if what.startswith("tag/"):
            self.tags[lines[0]["tag"]] = int(what[4:], 16)
            return {"ok": True}
        tags = [{"name": name, "ref": name, "targetCommit": f"{at:040x}"} for name, at in self.tags.items()]
        return {"repos/create": {"url": f"{self.url}/me/it"}, "refs": {"branches": [], "converts": [], "tags": tags},
                "validate-yaml": {"errors": [], "warnings": []}, "revision/main": {"id": "me/it"}}.get(what, {})


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body, server = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.server
        assert isinstance(server, HubServer)
        found = server.answer(self.path, [json.loads(line) for line in body.splitlines()])
        self.send_response(200 if found else 403)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    do_GET = do_POST

    def log_message(self, *_: Any) -> None: ...
