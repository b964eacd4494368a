"""A stand-in for an NDIF server: a process that has a model's weights and nnsight, but no nnpatch.

Run as a script, `python ndif_server.py FOLDER LOG [KEY]`: it serves the model in FOLDER on a port
that it prints, to clients with the API key KEY, and writes a line of JSON to LOG for each request.
It speaks as nnsight's own client does: a websocket at /subscribe that first tells a session, a form
posted to /request, and the result as bytes on the socket.
"""

from __future__ import annotations

import base64
import email.parser
import email.policy
import hashlib
import importlib.abc
import io
import json
import queue
import sys
import threading
import traceback
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FORBIDDEN = ("nnpatch", "nnpatch_core", "nnpatch_llama", "nnpatch_mistral", "nnpatch_gemma")


class Forbidding(importlib.abc.MetaPathFinder):
    """Raises for an import of nnpatch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"a server has no {name}")


class Server:
    """The model, and who waits for results of it."""

    def __init__(self, folder: str, log: str, key: str | None) -> None:
        import transformers
        from nnsight import TransformersModel

        module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        # What it would load for texts, which it is not given.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = TransformersModel(module, tokenizer=tokenizer)
        self.log, self.key = Path(log), key
        self.waiting: dict[str, queue.Queue[bytes]] = {}
        self.busy = threading.Lock()

    def answer(self, envelope: dict[str, Any], blob: bytes) -> None:
        """Run a request, and send what it saves, or how it fails, to who waits for it."""
        from nnsight.schema.response import ResponseModel

        told: dict[str, Any] = {"status": "COMPLETED"}
        with self.busy:
            try:
                result = self.run(blob, envelope)
                told["data"] = result
            except Exception:
                told = {"status": "ERROR", "description": traceback.format_exc()}
        with self.log.open("a") as file:
            sizes = {"sent": len(blob), "returned": len(told.get("data", b""))}
            line = {**sizes, "key": envelope["model_key"], "status": told["status"]}
            file.write(json.dumps(line) + "\n")
        message = ResponseModel(id="job", **told).pickle()
        self.waiting.pop(envelope["session_id"]).put(message)

    def run(self, blob: bytes, envelope: dict[str, Any]) -> bytes:
        import torch
        import zstandard
        from nnsight.schema.request import RequestModel
        from nnsight.tracing import tracer as tracing

        packed = envelope["compress"]
        self.model._remoteable_set_env(envelope["env"])
        objects = self.model._remoteable_persistent_objects()
        tracer = RequestModel.deserialize(blob, objects, packed)
        tracing.inc()
        try:
            tracer.execute(tracer.info.code)
            kept = tracing._saves()
            own = tracer.info.frame.f_locals.items()
            saves = {name: value for name, value in own if id(value) in kept}
        finally:
            tracing.dec()
        buffer = io.BytesIO()
        torch.save(saves, buffer)
        content = buffer.getvalue()
        return zstandard.ZstdCompressor().compress(content) if packed else content


class Handler(BaseHTTPRequestHandler):
    """Two addresses: /subscribe and /request."""

    server: Any

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        accept = f"{self.headers['Sec-WebSocket-Key']}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        digest = base64.b64encode(hashlib.sha1(accept.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", digest)
        self.end_headers()
        session = uuid.uuid4().hex
        messages: queue.Queue[bytes] = queue.Queue()
        self.server.ndif.waiting[session] = messages
        self.frame(1, json.dumps({"session_id": session}).encode())
        self.frame(2, messages.get())
        self.close_connection = True

    def frame(self, kind: int, content: bytes) -> None:
        """Send a message of text (1) or bytes (2) through a websocket."""
        size = len(content)
        head = bytes([0x80 | kind])
        if size < 126:
            head += bytes([size])
        elif size < 2**16:
            head += bytes([126]) + size.to_bytes(2, "big")
        else:
            head += bytes([127]) + size.to_bytes(8, "big")
        self.wfile.write(head + content)
        self.wfile.flush()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parser = email.parser.BytesParser(policy=email.policy.HTTP)
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in parser.parsebytes(head + content).iter_parts()
        }
        key = self.server.ndif.key
        if key is not None and self.headers.get("ndif-api-key") != key:
            self.tell(401, {"detail": "Missing or invalid API key."})
            return
        envelope = json.loads(parts["data"])
        self.tell(200, {"id": "job", "status": "RECEIVED"})
        self.server.ndif.answer(envelope, parts["blob"])

    def tell(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    sys.meta_path.insert(0, Forbidding())
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.ndif = Server(*sys.argv[1:3], sys.argv[3] if len(sys.argv) > 3 else None)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
