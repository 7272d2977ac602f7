import json
import subprocess
import sys

from tests.conftest import ROOT


def test_the_log_holds_no_values_of_variables() -> None:
    """A traceback's local variables are what clients send; they stay out of the log."""
    script = """
import structlog
from serving.observability.logs import configure_logging
configure_logging("info")
def fail():
    payload = "what a client sent"
    raise ValueError("reason")
try:
    fail()
except ValueError:
    structlog.get_logger().exception("request_failed")
import logging, warnings
logging.getLogger("grpc").warning("from the library")
warnings.warn("a warning")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["level"] for event in events] == ["error", "warning", "warning"]
    assert events[0]["exception"][0]["exc_value"] == "reason"
    assert "what a client sent" not in done.stderr
