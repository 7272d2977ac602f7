"""The page for operators: what it names is there, and every alert has its section."""

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from export.__main__ import main as export_main
from serving.client.__main__ import main as client_main
from serving.observability.metrics import REASONS
from serving.settings import Settings
from tests.conftest import ROOT
from tests.processes import serving

PAGE = (ROOT / "docs" / "operating.md").read_text()
ALERTS = ROOT / "deploy" / "monitoring" / "alerts.yml"
SERVING = "".join(path.read_text() for path in (ROOT / "serving").rglob("*.py"))


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def section(title: str) -> str:
    _, _, rest = PAGE.partition(f"\n## {title}\n")
    assert rest
    return rest.partition("\n## ")[0]


def anchors() -> set[str]:
    """Of the page's headings, as its readers make them."""
    titles = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_alert_has_a_section_and_names_it() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert re.findall(r"^### (.*)$", section("Alerts"), re.MULTILINE) == names
    for alert in alerts():
        page, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert (ROOT / page).read_text() == PAGE
        assert anchor == alert["alert"].lower()


def test_links_within_the_page_lead_somewhere() -> None:
    found = set(re.findall(r"\]\(#([^)]*)\)", PAGE))
    assert found
    assert found <= anchors()


def test_every_metric_of_the_page_is_one_of_the_servers(repository: Path) -> None:
    with (
        serving("--model-repository", repository, "--workers", "2") as process,
        urllib.request.urlopen(f"http://{process.events[-1]['metrics']}/metrics") as response,
    ):
        families = list(text_string_to_metric_families(response.read().decode()))
    histograms = {f.name for f in families if f.type == "histogram"}
    known = {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
    known |= {f"{name}_{part}" for name in histograms for part in ("sum", "count", "bucket")}
    found = set(re.findall(r"\b(?:kanserve|process)_[a-z_]+\b", PAGE)) - {"kanserve_details"}
    assert len(found) > 15
    assert found <= known


def test_every_flag_of_the_page_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    for main, argv in (
        (export_main, ["--help"]),
        (client_main, ["models", "--help"]),
        (client_main, ["bench", "--help"]),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    own = "\n".join(
        line for line in PAGE.splitlines() if not line.startswith(("kubectl ", "docker "))
    )
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", own))
    assert len(found) > 15
    assert found <= known
    variables = set(re.findall(r"KANSERVE_([A-Z_]+)", PAGE))
    assert {name.lower() for name in variables} <= set(Settings.model_fields)


def test_every_reason_and_every_event_of_the_page_is_told() -> None:
    told = re.findall(r"^\| `([a-z_]+)` \|", section("It refuses"), re.MULTILINE)
    assert sorted(told) == sorted(REASONS)
    events = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)` (?:in|and|says|has|names)", PAGE))
    events -= {"wait_ms"}
    for event in events:
        if not event.startswith(("kanserve_", "process_")):
            assert f'"{event}"' in SERVING, event
