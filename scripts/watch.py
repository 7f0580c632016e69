"""The report of a run in a browser, live while it trains.

    make watch RUN=outputs/try               http://127.0.0.1:8765, for a browser on this machine
    make watch RUN="outputs/a outputs/b" PORT=9000

Ctrl-C ends it; the run is not touched. For a run on another machine watch it there,
and connect by ssh -L 8765:127.0.0.1:8765 MACHINE.
"""

import errno
import http.server
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.cli import parse_arguments
from common.errors import InputError, MachineError, run_command
from common.pages.page import plotly
from common.pages.reading import run_folders
from common.pages.report import page

HOST = "127.0.0.1"
LOCAL = {HOST, "localhost", "::1"}


@dataclass(frozen=True)
class Args:
    """Reads the files of the runs and nothing else."""

    run: tuple[str, ...]
    """The folder of a run, or of several, which then share their plots."""
    port: int = 8765
    """The port on 127.0.0.1; 0 takes a free one."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    folders = run_folders(args.run)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server(folders, args.port) as serving:
        print(f"http://{HOST}:{serving.server_port} shows {', '.join(args.run)}. Ctrl-C ends it.", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()


def server(folders: list[Path], port: int) -> http.server.ThreadingHTTPServer:
    """A server of the report of those runs, for this machine only. Raises InputError where the port cannot be had."""

    class Handler(Pages):
        runs = folders

    try:
        return Server((HOST, port), Handler)
    except OverflowError:
        raise InputError(f"--port {port}: expected 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port}: in use; give another one, or 0 for a free one") from None
        raise MachineError(f"--port {port}: {error.strerror}") from None


def is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        return urlsplit("//" + host).hostname in LOCAL
    except ValueError:
        return False


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closed its page is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Pages(http.server.BaseHTTPRequestHandler):
    """Serves the report at / and the plotting library at /plotly.js."""

    runs: list[Path]

    def do_GET(self) -> None:
        # A page of another site could have its name resolve to 127.0.0.1, and read what is served here.
        if not is_local(self.headers.get("Host", "")):
            self._send(403, "text/plain", "This is for browsers on this machine.")
            return
        match self.path.partition("?")[0]:
            case "/":
                try:
                    self._send(200, "text/html", page(self.runs, live=True))
                except InputError as error:  # the folder is gone
                    self._send(404, "text/plain", str(error))
            case "/plotly.js":
                self._send(200, "text/javascript", plotly(), keep=True)
            case _:
                self._send(404, "text/plain", "There is nothing but the report.")

    def _send(self, status: int, kind: str, text: str, keep: bool = False) -> None:
        content = text.encode("utf-8", errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "max-age=86400" if keep else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *_: Any) -> None:
        """Nothing: a line for every look would hide what was printed."""


if __name__ == "__main__":
    run_command(main)
