"""A real HTTP server with OpenAI's chat completions: it counts calls, and fails as it is told to.

Answers depend on the request alone, so that two builds can be compared. Every text of an answer ends with the digest of
its request, which shows in the kept answers which calls have arrived.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any], int], Any]  # of a request and the number of its attempt: text, or a fault


class Fault:
    """Behaviour of a server instead of an answer: HTTP status, pause, raw body, finish reason or refusal."""

    def __init__(self, status: int = 200, *, pause: float = 0.0, body: bytes = b"", finish: str = "stop",
                 refusal: str | None = None, text: str = "", code: str | None = None) -> None:  # fmt: skip
        self.status, self.pause, self.body, self.finish = status, pause, body, finish
        self.refusal, self.text, self.code = refusal, text, code


def text_of(request: dict[str, Any]) -> str:
    """The prompt of a request."""
    return "".join(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


class ChatServer:
    """Use as a context manager; `url` is for an `Endpoint`."""

    def __init__(self, reply: Reply, *, pause: float = 0.0) -> None:
        self.reply, self.pause = reply, pause
        self.requests: list[dict[str, Any]] = []
        self.attempts: Counter[str] = Counter()  # by digest of the request
        self.sent: Counter[str] = Counter()  # answers sent in full
        self.most_at_once = self.at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client was killed, or gave up
                    server.handle(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def handle(self, http: BaseHTTPRequestHandler, body: bytes) -> None:
        request, key = json.loads(body), digest(body)
        with self._lock:
            self.requests.append(request)
            self.attempts[key] += 1
            attempt = self.attempts[key]
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            reply = self.reply(request, attempt)
            fault = reply if isinstance(reply, Fault) else Fault(text=f"{reply}\n#{key}")
            time.sleep(self.pause + fault.pause)
            content = fault.body or json.dumps(_response(request, fault)).encode()
            http.send_response(fault.status)
            http.send_header("Content-Type", "application/json")
            http.send_header("Content-Length", str(len(content)))
            http.send_header("retry-after-ms", "5")
            http.end_headers()
            http.wfile.write(content)
            http.wfile.flush()
            if fault.status == 200 and not fault.body:
                with self._lock:
                    self.sent[key] += 1
        finally:
            with self._lock:
                self.at_once -= 1

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _response(request: dict[str, Any], fault: Fault) -> dict[str, Any]:
    if fault.status != 200:
        return {"error": {"message": f"fault {fault.status}", "code": fault.code, "type": "fault", "param": None}}
    message = {"role": "assistant", "content": fault.text, "refusal": fault.refusal}
    words = len(text_of(request).split()), len(fault.text.split())
    usage = {"prompt_tokens": words[0], "completion_tokens": words[1], "total_tokens": sum(words)}
    choice = {"index": 0, "message": message, "finish_reason": fault.finish, "logprobs": None}
    names = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
    return {**names, "choices": [choice], "usage": usage}
