"""A stand-in for the service of Weights & Biases: as much of it as a run needs that is begun, resumed and ended."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class WandbService:
    """Keeps the history and the summary of one run; W&B's own client speaks to it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.operations: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                is_ours = self.path.endswith(("/graphql", "/file_stream"))  # the rest is W&B's own telemetry
                self.answer(service.reply(self.path, json.loads(body)) if is_ours else {})

            def do_GET(self) -> None:
                self.answer({})

            do_PUT = do_POST

            def answer(self, reply: dict[str, Any]) -> None:
                data = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reply(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self._take(request.get("files", {}))
            return {}
        operation = str(request.get("operationName") or request.get("query", "")[:80])
        self.operations.append(operation)
        project = {"id": "p", "name": "chord-rl", "entity": {"id": "e", "name": "us"}}
        bucket = {
            "id": "b", "name": "abc", "displayName": "run", "description": "", "config": "{}", "sweepName": None,
            "historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]), "tags": [],
            "summaryMetrics": json.dumps(self.summary), "wandbConfig": '{"t": 1}', "project": project,
        }  # fmt: skip
        return {
            "data": {
                "viewer": {"id": "v", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}},
                "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None},
                "model": {**project, "bucket": bucket if self.rows else None},
                "upsertBucket": {"bucket": bucket, "inserted": not self.rows},
                "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
            }
        }

    def _take(self, files: dict[str, Any]) -> None:
        for name, chunk in files.items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                self.rows[chunk["offset"] :] = lines
            elif name == "wandb-summary.json":
                self.summary = lines[-1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
