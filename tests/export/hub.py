"""A server of the Hub's API that keeps what a client uploads: create, preupload, LFS, commit."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Files over a kilobyte that are no JSON text go through LFS, as weights do on the Hub."""

    def __init__(self, refuses=False):
        self.refuses = refuses
        self.files, self.objects, self.created, self.token = {}, {}, None, None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def body(self):
                if self.headers.get("Transfer-Encoding") == "chunked":
                    content = b""
                    while size := int(self.rfile.readline(), 16):
                        content += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return content
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def answer(self, content, status=200):
                encoded = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            def do_GET(self):
                self.answer({"error": "not found"}, 404)

            def do_PUT(self):
                content = self.body()
                hub.objects[hashlib.sha256(content).hexdigest()] = content
                self.answer({})

            def do_POST(self):
                body = self.body()
                hub.token = self.headers.get("Authorization", hub.token)
                path = self.path.split("?")[0]
                if hub.refuses:
                    self.answer({"error": "no right to write"}, 403)
                elif path == "/api/repos/create":
                    hub.created = json.loads(body)
                    self.answer({"url": f"{hub.url}/me/model", "name": "me/model"})
                elif path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    asked = json.loads(body)["files"]
                    kinds = ["lfs" if one["path"].endswith(".safetensors") else "regular" for one in asked]
                    self.answer({"files": [
                        {"path": one["path"], "uploadMode": kind, "shouldIgnore": False}
                        for one, kind in zip(asked, kinds, strict=True)
                    ]})  # fmt: skip
                elif path.endswith("/info/lfs/objects/batch"):
                    objects = json.loads(body)["objects"]
                    self.answer({"transfer": "basic", "objects": [
                        {**one, "actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}", "header": {}}}}
                        for one in objects
                    ]})  # fmt: skip
                elif "/commit/" in path:
                    hub.commit([json.loads(line) for line in body.splitlines() if line.strip()])
                    oid = "0" * 40
                    self.answer({"commitUrl": f"{hub.url}/me/model/commit/{oid}", "commitOid": oid, "success": True})
                else:
                    self.answer({"error": path}, 404)

        return Handler
