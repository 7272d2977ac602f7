"""What is printed holds no character that a terminal obeys, or that hides what is there."""

import io
import json
import logging
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
import structlog
from rich.console import Console
from rich.table import Table

from export.__main__ import main
from export.report import Report
from kan_bundle.escaping import EscapingHook, escape
from serving.client.__main__ import _fail
from serving.observability.logs import configure_logging
from tests.hostile.writing import archive, named, pickled, safetensors

OBEYED = [
    chr(code)
    for code in range(0x110000)
    if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")
    or unicodedata.bidirectional(chr(code)) in ("LRE", "LRO", "PDF", "RLE", "RLO", "LRI", "RLI")
]
"""By Unicode's own tables."""


def test_every_character_that_is_obeyed_is_escaped_and_others_stay() -> None:
    for character in OBEYED:
        written = escape(f"a{character}b")
        assert written == f"a\\u{ord(character):04x}b"
    letters = "Größe, 層, नमस्ते, می‌خواهم, 👩‍💻, 1 + 2 = 3\u00a0€"
    assert escape(letters) == letters
    assert escape("a\nb\tc", keep="\n") == "a\nb\\u0009c"


def test_json_stays_json() -> None:
    value = {"a\x1b\x7f": "\u202e\U000e0041\ud800\n"}
    for ascii_only in (True, False):
        written = escape(json.dumps(value, ensure_ascii=ascii_only))
        assert written.isprintable()
        assert json.loads(written) == value


def test_a_console_keeps_its_own_colours_and_nobody_elses() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=60)
    console.push_render_hook(EscapingHook())  # type: ignore[arg-type]
    table = Table("name")
    table.add_row("evil\x1b[2J\x9b31m")
    console.print(table)
    console.print("red\x1b]0;owned\x07", style="red")
    written = out.getvalue()
    assert "\x1b[31m" in written  # its own
    for obeyed in ("\x1b[2J", "\x9b", "\x1b]", "\x07"):
        assert obeyed not in written
    assert "evil\\u001b[2J\\u009b31m" in written


def test_what_an_export_tells_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.say("a\x1b[2J")
    report.warn("b\x1b[2J\nerror: forged")
    report.fail("c\x9b2J")
    told = capsys.readouterr().err
    assert "\x1b[2J" not in told
    assert "\x9b" not in told
    assert "warning: b\\u001b[2J\\u000aerror: forged" in told
    assert report.warnings == ["b\\u001b[2J\\u000aerror: forged"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.pt", archive(b"\x80\x02" + named("evil\x1b[2J.C\x9b") + b")\x81.")),
        ("m.pt", archive(pickled({"layers.0.\x1b[2J\nerror: forged": 1}))),
        ("\x1b[2J\nerror: forged.pt", b"no checkpoint"),
        (
            "m.safetensors",
            safetensors(
                {"\x1b[2J\nx": {"dtype": "\x1b[2J", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
            ),
        ),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], []])
def test_a_hostile_files_error_is_one_line_without_controls(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    command: list[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    output = [] if command else ["--quiet", "--output", str(tmp_path / "models")]
    assert main([*command, str(path), *output]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.removesuffix("\n").isprintable()


def test_the_client_and_the_log_escape(capsys: pytest.CaptureFixture[str]) -> None:
    _fail("model '\x1b[2J\u202e\x7f' is not there")
    assert capsys.readouterr().err == "error: model '\\u001b[2J\\u202e\\u007f' is not there\n"
    handlers, level = logging.getLogger().handlers, logging.getLogger().level
    raises = logging.raiseExceptions
    hooks = sys.excepthook, threading.excepthook
    try:
        configure_logging("info")
        structlog.get_logger().info("event", reason="\x1b\x7f\u202e")
        written = capsys.readouterr().err
    finally:
        sys.excepthook, threading.excepthook = hooks
        logging.getLogger().handlers = handlers
        logging.getLogger().setLevel(level)
        logging.raiseExceptions = raises
        logging.captureWarnings(False)
        structlog.reset_defaults()
    assert written.removesuffix("\n").isprintable()
    assert json.loads(written)["reason"] == "\x1b\x7f\u202e"
