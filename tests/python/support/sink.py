"""A local HTTP server in the place of the one that an agent reports to: keeps what is posted, answers with success."""

import gzip
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Sink:
    """`with Sink() as sink:` collects (path, body) of every request; bodies are unpacked."""

    def __init__(self):
        self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def take(handler):
                body = handler.body()
                match handler.headers.get("Content-Encoding"):
                    case "gzip":
                        body = gzip.decompress(body)
                    case "deflate":
                        body = zlib.decompress(body)
                self.requests.append((handler.path, body))
                handler.send_response(200)
                handler.send_header("Content-Length", "2")
                handler.end_headers()
                handler.wfile.write(b"{}")

            do_GET = do_POST = do_PUT = take

            def body(handler):
                if handler.headers.get("Transfer-Encoding") != "chunked":
                    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                chunks = []
                while size := int(handler.rfile.readline(), 16):
                    chunks.append(handler.rfile.read(size))
                    handler.rfile.readline()
                handler.rfile.readline()
                return b"".join(chunks)

            def log_message(handler, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def bodies(self, *paths):
        """What was posted to these paths."""
        return [body for path, body in list(self.requests) if path.split("?")[0] in paths]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
