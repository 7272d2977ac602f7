"""What the metrics port answers: the metrics, a page for people that reads them, models' reports.

Every path is looked up in a table or handed to who knows the models; none is ever joined to the
file system. The page is static, its script asks for /metrics, and nothing of it comes from another
place, nor would the browser take it. This module knows neither models nor gRPC.
"""

import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from serving.errors import ControlRefused, ModelNotFound

ReadReport = Callable[[str, str], bytes]
"""Gives the report of a model and a version, as they stand in a path.

Raises ModelNotFound if there is none, and ControlRefused if it cannot be had.
"""

_Headers = list[tuple[str, str]]

_ASSETS = {
    "/": ("status.html", "text/html; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/status.svg": ("status.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("status", "models", "history", "prometheus", "chart", "words")
    },
}
_OTHER_HOST = (
    "expected an IP address, localhost or a name of this server as the host, found another name; "
    "ask by its address, or have the name added to --metrics-hosts"
)
_REPORT = re.compile(r"/reports/([^/]+)/([^/]+)")
_TEXT = "text/plain; charset=utf-8"

_CLOSED = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE_POLICY = f"{_CLOSED}; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
# A report brings its own script, styles and pictures. It is a file of the bundle, so it may draw
# and no more: it is no page of this origin (sandbox), asks nobody for anything (default-src), sends
# no form and opens no window.
_REPORT_POLICY = (
    f"{_CLOSED}; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "sandbox allow-scripts"
)


def make_app(
    registry: CollectorRegistry,
    read_report: ReadReport,
    is_own_host: Callable[[str | None], bool],
) -> WSGIApplication:
    """Make the application behind the port.

    Args:
        registry: What /metrics tells.
        read_report: Gives what /reports/MODEL/VERSION shows.
        is_own_host: Whether a request with this Host is answered.
    """
    metrics: WSGIApplication = make_wsgi_app(registry)
    folder = files("serving.observability") / "status"
    assets = {path: (kind, (folder / name).read_bytes()) for path, (name, kind) in _ASSETS.items()}

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not is_own_host(environ.get("HTTP_HOST")):
            return _refuse(start_response, "421 Misdirected Request", _OTHER_HOST)
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        report = _REPORT.fullmatch(path)
        if path not in assets and report is None:
            return _refuse(start_response, "404 Not Found", "there is nothing here; / has a page")
        if environ["REQUEST_METHOD"] != "GET":
            reason = "expected GET or HEAD"
            return _refuse(
                start_response, "405 Method Not Allowed", reason, [("Allow", "GET, HEAD")]
            )
        if report is None:
            kind, content = assets[path]
            return _reply(start_response, "200 OK", kind, content, _PAGE_POLICY)
        try:
            content = read_report(*report.groups())
        except ModelNotFound as error:
            return _refuse(start_response, "404 Not Found", str(error))
        except ControlRefused as error:
            return _refuse(start_response, "503 Service Unavailable", str(error))
        return _reply(start_response, "200 OK", "text/html; charset=utf-8", content, _REPORT_POLICY)

    return _with_head(answer)


def _refuse(
    start_response: StartResponse, status: str, reason: str, headers: _Headers | None = None
) -> list[bytes]:
    content = f"{reason}\n".encode()
    return _reply(start_response, status, _TEXT, content, _CLOSED, headers)


def _reply(
    start_response: StartResponse,
    status: str,
    kind: str,
    content: bytes,
    policy: str,
    headers: _Headers | None = None,
) -> list[bytes]:
    said = [
        ("Content-Type", kind),
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cache-Control", "no-store"),
    ]
    start_response(status, said + (headers or []))
    return [content]


def _with_head(app: WSGIApplication) -> WSGIApplication:
    """Answer HEAD as GET, without the content."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "HEAD":
            return app(environ, start_response)
        said: list[tuple[str, _Headers]] = []

        def keep(status: str, headers: _Headers, exc_info: Any = None) -> Callable[[bytes], object]:
            said.append((status, headers))
            return lambda content: None

        content = b"".join(app({**environ, "REQUEST_METHOD": "GET"}, keep))
        ((status, headers),) = said
        start_response(status, [*headers, ("Content-Length", str(len(content)))])
        return []

    return answer
