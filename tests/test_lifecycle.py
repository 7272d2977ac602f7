"""Which versions are served, with folders of real names and models that only pretend."""

import errno
import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from structlog.testing import capture_logs

from kan_bundle.errors import IntegrityError, LayoutError
from serving.errors import ControlRefused, ModelNotFound, ModelNotReady
from serving.models.desired_state import PinnedVersion, VersionPlan, plans_from_json
from serving.models.host import LocalHost
from serving.models.lifecycle import ModelLifecycle, _stamp
from serving.models.loading import LoadedModel
from serving.models.policy import parse_policy
from serving.models.repository import MOST_IDLE_MODELS, Repository


@dataclass(eq=False)
class Pretended:
    """In place of a loaded model: what lay in the folder when it was loaded."""

    content: str
    manifest: ClassVar = SimpleNamespace(source=None, layers=())
    engine: ClassVar = SimpleNamespace(fused_layers=0, placement={})


@dataclass
class Kept:
    """A repository, its folder and its lifecycle."""

    root: Path
    repository: Repository
    log: list[Any] = field(default_factory=list)
    changes: int = 0
    now: float = 0.0
    while_loading: Callable[[], None] = lambda: None

    def write(self, version: int, content: str, name: str = "m") -> None:
        folder = self.root / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".new"
        aside.write_text(content)
        aside.replace(folder / "model")  # another inode, as an export gives it

    def lifecycle(self, policy: str) -> ModelLifecycle:
        def load(version: PinnedVersion) -> LoadedModel:
            self.while_loading()
            content = (version.folder.path / "model").read_text()
            if content == "bad":
                raise IntegrityError(f"{version.path}/model: is bad")
            if content == "worse":
                raise RuntimeError("nobody expected it")
            return cast(LoadedModel, cast(Any, Pretended(content)))

        def on_change() -> None:
            self.changes += 1

        host = LocalHost(self.repository, load, on_change)
        return ModelLifecycle(self.root, parse_policy(policy), host, lambda: self.now)

    def logged(self, *events: str) -> list[tuple[int, str]]:
        return [(e["version"], e["event"]) for e in self.log if e["event"] in events]

    def answers(self, version: str = "") -> str:
        return cast(Pretended, cast(Any, self.repository.find("m", version))).content

    def states(self) -> dict[int, str]:
        return {n: v.state for n, v in sorted(self.repository.models["m"].items())}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with capture_logs() as log:
        yield Kept(tmp_path, Repository(), log)


@pytest.mark.parametrize(
    ("policy", "served"),
    [("latest:1", [3]), ("latest:2", [2, 3]), ("all", [1, 2, 3]), ("specific:1,3", [1, 3])],
)
def test_the_policy_says_which_versions_serve(kept: Kept, policy: str, served: list[int]) -> None:
    for version in (1, 2, 3):
        kept.write(version, f"v{version}")
    kept.lifecycle(policy).refresh()
    assert kept.repository.served_versions("m") == served
    assert kept.answers() == "v3"
    assert set(kept.states()) == {1, 2, 3}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latest",
        "latest:0",
        "latest:x",
        "specific:",
        "some",
        "latest:1,2",
        "all:1",
        "specific:1,,2",
        "latest:٣",
    ],
)
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"latest:N, all or specific"):
        parse_policy(text)


def test_a_new_version_takes_over_only_once_it_is_loaded(kept: Kept) -> None:
    kept.write(1, "old")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    kept.write(2, "new")
    seen = []
    kept.while_loading = lambda: seen.append((kept.answers(), kept.states()))
    lifecycle.refresh()
    assert seen == [("old", {1: "READY", 2: "LOADING"})]
    assert kept.answers() == "new"
    assert kept.states() == {1: "UNAVAILABLE", 2: "READY"}
    assert kept.logged("model_unloaded") == [(1, "model_unloaded")]


@pytest.mark.parametrize("content", ["bad", "worse"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_version_that_fails_leaves_the_one_before_serving(
    kept: Kept, content: str, restarted: bool
) -> None:
    kept.write(1, "old")
    lifecycle = kept.lifecycle("latest:1")
    if not restarted:
        lifecycle.refresh()
    kept.write(2, content)
    lifecycle.refresh()
    assert kept.answers() == "old"
    assert kept.states() == {1: "READY", 2: "UNAVAILABLE"}
    reason = kept.repository.models["m"][2].reason
    assert reason
    assert str(kept.root) not in reason
    with pytest.raises(ModelNotReady, match="log says more"):
        kept.answers("2")
    assert kept.logged("model_unloaded") == []


def test_a_failed_version_is_tried_again_when_its_files_change(kept: Kept) -> None:
    kept.write(1, "bad")
    lifecycle = kept.lifecycle("latest:1")
    for _ in range(3):
        lifecycle.refresh()
    assert kept.logged("model_refused", "model_ready") == [(1, "model_refused")]
    kept.write(1, "good")
    lifecycle.refresh()
    assert kept.logged("model_refused", "model_ready") == [(1, "model_refused"), (1, "model_ready")]
    assert kept.answers() == "good"


def test_a_version_replaced_by_a_bad_one_goes_on_as_it_was(kept: Kept) -> None:
    kept.write(1, "old")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    kept.write(1, "bad")
    lifecycle.refresh()
    lifecycle.refresh()
    assert kept.answers() == "old"
    assert kept.repository.models["m"][1].reason
    kept.write(1, "new")
    lifecycle.refresh()
    assert kept.answers() == "new"
    assert not kept.repository.models["m"][1].reason


def test_what_has_left_the_folder_is_served_no_longer(kept: Kept) -> None:
    kept.write(1, "v1")
    kept.write(2, "v2")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    (kept.root / "m" / "2" / "model").unlink()
    (kept.root / "m" / "2").rmdir()
    lifecycle.refresh()
    assert kept.answers() == "v1"
    (kept.root / "m" / "1" / "model").unlink()
    (kept.root / "m" / "1").rmdir()
    lifecycle.refresh()
    with pytest.raises(ModelNotFound):
        kept.answers()


def test_a_repository_that_cannot_be_read_changes_nothing(kept: Kept) -> None:
    kept.write(1, "v1")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    kept.root.rename(kept.root.with_name("away"))
    with pytest.raises(LayoutError):
        lifecycle.refresh()
    assert kept.answers() == "v1"
    kept.root.with_name("away").rename(kept.root)


def test_only_models_that_are_named_are_looked_at(kept: Kept) -> None:
    kept.write(1, "a", name="m")
    kept.write(1, "b", name="other")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh(["m"])
    assert set(kept.repository.models) == {"m"}
    with pytest.raises(ModelNotFound):
        lifecycle.refresh(["none"])


def test_a_model_can_be_unloaded_and_loaded_again(kept: Kept) -> None:
    kept.write(1, "v1")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    lifecycle.unload("m")
    with pytest.raises(ModelNotReady, match="unloaded"):
        kept.answers()
    lifecycle.refresh(["m"])
    assert kept.answers() == "v1"
    with pytest.raises(ModelNotFound):
        lifecycle.unload("none")


def test_nothing_holds_on_to_a_version_that_was_replaced(kept: Kept) -> None:
    kept.write(1, "old")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    old = weakref.ref(kept.repository.find("m", ""))
    kept.write(2, "new")
    lifecycle.refresh()
    gc.collect()
    assert old() is None


def test_ten_thousand_bogus_versions_cost_no_more_than_a_few(kept: Kept) -> None:
    """Of 300 in a row, what is known is as much as of 40, and each is looked into once."""
    tried: list[int] = []
    kept.while_loading = lambda: tried.append(1)
    for version in range(1, 301):
        kept.write(version, "bad")
    kept.write(301, "good")
    lifecycle = kept.lifecycle("all")
    lifecycle.refresh()
    assert len(tried) == 301
    lifecycle.refresh()
    assert len(tried) == 301
    assert kept.states() == {301: "READY"} | dict.fromkeys(range(269, 301), "UNAVAILABLE")
    assert kept.repository.failed == 300
    assert len(kept.logged("model_refused")) == 300
    with pytest.raises(ModelNotFound, match="has no version '1'; it serves 301"):
        kept.repository.find("m", "1")
    kept.write(1, "mended")
    lifecycle.refresh()
    assert len(tried) == 302
    assert kept.answers("1") == "mended"
    assert kept.repository.failed == 299


def test_bogus_models_are_known_up_to_a_number_of_them(kept: Kept) -> None:
    for i in range(200):
        kept.write(1, "bad", f"n{i}")
    kept.write(1, "good", "z")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    assert len(kept.repository.models) == 129
    assert kept.repository.models["z"][1].state == "READY"
    assert kept.repository.failed == 200
    kept.write(1, "mended", "n99")
    lifecycle.refresh()
    assert kept.repository.models["n99"][1].state == "READY"
    assert len(kept.repository.models) in (129, 130)


def test_a_bogus_model_that_is_gone_is_no_longer_counted(kept: Kept) -> None:
    for i in range(150):
        kept.write(1, "bad", f"n{i:03}")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    for i in range(150):
        shutil.rmtree(kept.root / f"n{i:03}")
    lifecycle.refresh()
    assert not kept.repository.models
    assert kept.repository.failed == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data"])
def test_a_change_beside_any_number_of_files_is_noticed(tmp_path: Path, name: str) -> None:
    for number in range(300):
        (tmp_path / f"x{number}").touch()
    (tmp_path / name).write_text("old")
    before = _stamp(tmp_path)
    assert len(before) < 100
    (tmp_path / name).write_text("newer")
    assert _stamp(tmp_path) != before


def test_all_models_that_were_unloaded_are_known(kept: Kept) -> None:
    for number in range(200):
        kept.write(1, "good", f"m{number}")
    for number in range(MOST_IDLE_MODELS + 9):
        kept.write(1, "bad", f"bad{number}")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    for number in range(200):
        lifecycle.unload(f"m{number}")
    assert len(kept.repository.models) == 200 + MOST_IDLE_MODELS
    with pytest.raises(ModelNotReady, match="it was unloaded; have it loaded again"):
        kept.repository.find("m199", "")


def test_a_model_is_visible_while_it_is_loading_beside_any_number_of_bad_ones(kept: Kept) -> None:
    for number in range(MOST_IDLE_MODELS + 9):
        kept.write(1, "bad", f"bad{number}")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    kept.write(1, "good")
    seen = []
    kept.while_loading = lambda: seen.append(kept.states())
    lifecycle.refresh(["m"])
    assert seen == [{1: "LOADING"}]


def test_a_model_that_has_failed_makes_room_for_one_that_the_policy_leaves_out(kept: Kept) -> None:
    for number in range(MOST_IDLE_MODELS + 9):
        kept.write(7, "bad", f"bad{number}")
    lifecycle = kept.lifecycle("specific:7")
    lifecycle.refresh()
    kept.write(1, "good")
    lifecycle.refresh()
    assert len(kept.repository.models) == MOST_IDLE_MODELS
    assert kept.states() == {1: "UNAVAILABLE"}


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (IntegrityError("the hash differs"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
    ],
)
def test_failures_of_the_system_are_retried_after_a_while_and_others_when_files_change(
    kept: Kept, error: Exception, transient: bool
) -> None:
    attempts: list[float] = []

    def fail() -> None:
        attempts.append(kept.now)
        if len(attempts) < 4:
            raise IntegrityError("cannot be read") from error

    kept.while_loading = fail
    kept.write(1, "good")
    lifecycle = kept.lifecycle("latest:1")
    for kept.now in (0.0, 0.9, 1.0, 2.9, 3.0, 6.9, 7.0, 8.0):
        lifecycle.refresh()
    assert attempts == ([0.0, 1.0, 3.0, 7.0] if transient else [0.0])
    assert (kept.states() == {1: "READY"}) is transient


def test_without_polling_only_what_failed_for_a_moment_is_loaded_again(kept: Kept) -> None:
    def fail() -> None:
        raise MemoryError

    kept.write(1, "v1")
    kept.write(1, "bad", "other")
    kept.while_loading = fail
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    assert kept.states() == {1: "UNAVAILABLE"}
    kept.while_loading = lambda: None
    kept.write(2, "v2")  # which came later
    lifecycle.retry()
    assert kept.states() == {1: "UNAVAILABLE"}  # it is not due
    kept.now = 1.0
    lifecycle.retry()
    assert kept.states() == {1: "READY"}


def test_a_client_may_have_a_failed_version_loaded_again_at_once(kept: Kept) -> None:
    kept.write(1, "good")
    failing = True

    def fail() -> None:
        if failing:
            raise IntegrityError("cannot be read") from OSError(errno.ENOSPC, "No space left")

    kept.while_loading = fail
    lifecycle = kept.lifecycle("latest:1")
    for _ in range(2):
        with pytest.raises(ControlRefused, match="version 1 of model 'm': it failed its checks"):
            lifecycle.load("m")
    failing = False
    lifecycle.load("m")
    assert kept.answers() == "good"


def test_loads_end_when_the_server_stops_and_nothing_changes_any_more(kept: Kept) -> None:
    kept.write(1, "old")
    kept.write(1, "old", "n")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh(["m"])
    kept.write(2, "new")
    kept.while_loading = lifecycle.close
    lifecycle.refresh()
    assert kept.answers() == "old"
    assert set(kept.repository.models) == {"m"}


def test_a_model_whose_folder_cannot_be_read_for_a_moment_goes_on(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.write(1, "v1")
    kept.write(1, "w1", "other")
    lifecycle = kept.lifecycle("latest:1")
    lifecycle.refresh()
    iterdir = Path.iterdir

    def stale(path: Path) -> Iterator[Path]:
        if path.name == "m":
            raise OSError(errno.ESTALE, "Stale file handle")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", stale)
    lifecycle.refresh()
    assert kept.answers() == "v1"
    assert set(kept.repository.models) == {"m", "other"}
    monkeypatch.undo()
    shutil.rmtree(kept.root / "m")
    lifecycle.refresh()
    assert set(kept.repository.models) == {"other"}


def test_plans_survive_json() -> None:
    pinned = PinnedVersion("m", 2, "/models/m/2", "ab" * 32, 7)
    plans = {1: VersionPlan(None, "why", "what to do", unloaded=True), 2: VersionPlan(pinned)}
    assert plans_from_json(json.loads(json.dumps(plans, default=vars))) == plans
