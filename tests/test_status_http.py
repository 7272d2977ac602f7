"""What the metrics port answers over HTTP: the page, reports of models, and nothing else."""

import http.client
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kan_bundle.integrity import record_file
from kan_bundle.manifest import read_manifest, write_manifest
from serving.server import Server
from tests.bundles import publish
from tests.conftest import STATE_DICTS
from tests.processes import serving
from tests.servers import WAIT_S, await_true, served

NAME = STATE_DICTS[0].name
REPORT = "<!doctype html><title>report</title><style>p { color: red }</style><p>é</p>\n".encode()


def ask(address: str, path: str, method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
    """Ask for a path exactly as it is written: status, headers, content."""
    connection = http.client.HTTPConnection(address, timeout=WAIT_S)
    try:
        connection.putrequest(method, path)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def add_report(folder: Path) -> None:
    """Write a report into a version, as an export that makes one does."""
    (folder / "report.html").write_bytes(REPORT)
    manifest = read_manifest(folder)
    files = manifest.files | {"report.html": record_file(folder / "report.html")}
    write_manifest(replace(manifest, files=files), folder)


def drop_report(folder: Path) -> None:
    """Take the report out of a version, as one that an older kanserve exported."""
    (folder / "report.html").unlink()
    manifest = read_manifest(folder)
    files = {name: record for name, record in manifest.files.items() if name != "report.html"}
    write_manifest(replace(manifest, files=files), folder)


@pytest.fixture(scope="module")
def reported(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose version 2 has a report, whose version 1 is left out, and 3 is damaged."""
    root = tmp_path_factory.mktemp("reported")
    for version in (1, 2, 3):
        add_report(publish(repository / NAME / "1", root / NAME, version))
    (root / NAME / "3" / "model.onnx").write_bytes(b"damaged")
    (root / "secret.txt").write_text("secret")
    with served(root) as (server, _):
        yield server


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/?every=5", "text/html; charset=utf-8"),
        ("/status.css", "text/css; charset=utf-8"),
        ("/status.js", "text/javascript; charset=utf-8"),
        ("/status.svg", "image/svg+xml"),
    ],
)
def test_the_page_is_served_with_a_policy_that_takes_nothing_from_elsewhere(
    server: Server, path: str, kind: str
) -> None:
    status, headers, content = ask(server.metrics_address, path)
    assert (status, headers["Content-Type"]) == (200, kind)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) <= {"'none'", "'self'"}
    assert int(headers["Content-Length"]) == len(content) > 0


class Links(HTMLParser):
    """Collects what a page refers to, and whatever would need a looser policy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href"):
                self.found.add(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
        if tag == "style" or (tag == "script" and "src" not in dict(attributes)):
            self.inline.append(tag)


def test_all_that_the_page_refers_to_is_served_from_here(server: Server) -> None:
    links = Links()
    links.feed(ask(server.metrics_address, "/")[2].decode())
    assert not links.inline
    assert {"/status.js", "/status.css", "/metrics"} <= links.found
    for path in links.found:
        assert ask(server.metrics_address, path)[0] == 200, path


def test_metrics_stay_what_prometheus_reads(server: Server) -> None:
    status, headers, content = ask(server.metrics_address, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    names = {family.name for family in text_string_to_metric_families(content.decode())}
    assert {"kanserve_model_state", "kanserve_calls"} <= names


@pytest.mark.parametrize(
    "path",
    [
        "/status.html",
        "/status/",
        "/status/status.js",
        "/metrics/",
        "/reports",
        "/reports/",
        f"/reports/{NAME}",
        f"/reports/{NAME}/",
        f"/reports/{NAME}/2/report.html",
        f"/reports/{NAME}/2/",
        f"/reports/{NAME}/02",
        f"/reports/{NAME}/1",  # left out by the policy
        f"/reports/{NAME}/3",  # failed its checks
        f"/reports/{NAME}/4",
        "/reports/none/1",
        "/reports/../secret.txt",
        f"/reports/{NAME}/../../secret.txt",
        "/reports/..%2Fsecret.txt/1",
        f"/reports/{NAME}/2%2F..%2F..%2F..%2Fsecret.txt",
        f"/reports/{NAME}/2%0A",
        "//etc/passwd",
        "/../exposition.py",
        "/%2e%2e/exposition.py",
        "/favicon.ico",
    ],
)
def test_any_other_path_is_not_found_and_says_so_in_plain_words(
    reported: Server, path: str
) -> None:
    status, headers, content = ask(reported.metrics_address, path)
    assert (status, headers["Content-Type"]) == (404, "text/plain; charset=utf-8")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"secret" not in content


@pytest.mark.parametrize("path", ["/", "/status.js", f"/reports/{NAME}/2"])
def test_head_is_get_without_content_and_nothing_else_is_allowed(
    reported: Server, path: str
) -> None:
    address = reported.metrics_address
    status, headers, content = ask(address, path)
    assert (status, len(content)) == (200, int(headers["Content-Length"]))
    head_status, head_headers, nothing = ask(address, path, "HEAD")
    assert (head_status, nothing) == (200, b"")
    same = {"Content-Type", "Content-Length", "Content-Security-Policy", "Cache-Control"}
    assert {name: headers[name] for name in same} == {name: head_headers[name] for name in same}
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"):
        status, headers, _ = ask(address, path, method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), method


def test_head_of_the_metrics_tells_their_length(server: Server) -> None:
    status, headers, content = ask(server.metrics_address, "/metrics", "HEAD")
    assert (status, content) == (200, b"")
    assert int(headers["Content-Length"]) > 0
    assert ask(server.metrics_address, "/metrics", "POST")[0] == 405


def test_a_report_is_shown_as_it_was_exported_and_may_only_draw(reported: Server) -> None:
    status, headers, content = ask(reported.metrics_address, f"/reports/{NAME}/2")
    assert (status, content) == (200, REPORT)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    parts = headers["Content-Security-Policy"].split("; ")
    policy = {name: value for name, _, value in (part.partition(" ") for part in parts)}
    assert policy.pop("sandbox") == "allow-scripts"  # and nothing else: no page of this origin
    assert policy.pop("default-src") == "'none'"  # no connection, to here or elsewhere
    assert policy.pop("script-src") == policy.pop("style-src") == "'unsafe-inline'"
    assert policy.pop("img-src") == "data:"
    assert set(policy.values()) == {"'none'"}


def test_a_version_without_a_report_has_none_to_show_and_tells_no_path_of_one(
    repository: Path, tmp_path: Path
) -> None:
    drop_report(publish(repository / NAME / "1", tmp_path / NAME, 1))
    with served(tmp_path) as (server, _):
        status, _, content = ask(server.metrics_address, f"/reports/{NAME}/1")
        assert status == 404
        assert b"has no report" in content
        text = ask(server.metrics_address, "/metrics")[2].decode()
    infos = [line for line in text.splitlines() if line.startswith("kanserve_model_info{")]
    assert len(infos) == 1
    assert 'report=""' in infos[0]


def test_the_report_of_an_export_is_what_is_shown(server: Server, repository: Path) -> None:
    for golden in STATE_DICTS:
        status, headers, content = ask(server.metrics_address, f"/reports/{golden.name}/1")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert content == (repository / golden.name / "1" / "report.html").read_bytes()


def test_a_report_that_was_changed_is_not_shown(repository: Path, tmp_path: Path) -> None:
    folder = publish(repository / NAME / "1", tmp_path / NAME, 1)
    add_report(folder)
    with served(tmp_path) as (server, _):
        (folder / "report.html").write_bytes(REPORT.replace(b"report", b"rebort"))
        status, _, content = ask(server.metrics_address, f"/reports/{NAME}/1")
        assert status == 503
        assert b"not the one that was exported" in content
        assert str(tmp_path).encode() not in content
        (folder / "report.html").unlink()
        assert ask(server.metrics_address, f"/reports/{NAME}/1")[0] == 503


def test_metrics_tell_what_a_version_is_and_how_exact_it_was_at_export(
    reported: Server, repository: Path
) -> None:
    text = ask(reported.metrics_address, "/metrics")[2].decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    (info,) = (sample for sample in samples if sample.name == "kanserve_model_info")
    manifest = read_manifest(repository / NAME / "1")
    assert info.value == 1
    assert info.labels == {
        "model": NAME,
        "version": "2",
        "sha256": manifest.files["model.onnx"].sha256,
        "report": f"/reports/{NAME}/2",
        "prune_threshold": "",
        "accepts": "",
    }
    told = {s.labels["runtime"]: s.value for s in samples if s.name == "kanserve_model_parity"}
    assert told == {record.runtime: record.excess for record in manifest.parity}
    assert "torchscript" in told


def test_several_processes_show_one_page_and_the_reports_of_any(
    repository: Path, tmp_path: Path
) -> None:
    folder = publish(repository / NAME / "1", tmp_path / NAME, 1)
    add_report(folder)
    with serving("--model-repository", tmp_path, "--workers", "2", "--drain-s", "0") as process:
        address = process.events[-1]["metrics"]
        assert ask(address, "/")[0] == 200
        # Until one does that is slow to answer, it is 503.
        await_true(lambda: ask(address, f"/reports/{NAME}/1")[::2] == (200, REPORT))
        await_true(lambda: ask(address, f"/reports/{NAME}/2")[0] == 404)
        shutil.copy(folder / "manifest.json", folder / "report.html")
        assert ask(address, f"/reports/{NAME}/1")[0] == 503
