"""Which versions are served, with folders of real names and models that only pretend."""

import gc
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
from kan_bundle.layout import BundleFolder
from serving.errors import ModelNotFound, ModelNotReady
from serving.models.control import Keeper, _stamp
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
    """A repository, its folder and its keeper."""

    root: Path
    repository: Repository
    log: list[Any] = field(default_factory=list)
    changes: int = 0
    while_loading: Callable[[], None] = lambda: None

    def write(self, version: int, content: str, name: str = "m") -> None:
        folder = self.root / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".new"
        aside.write_text(content)
        aside.replace(folder / "model")  # another inode, as an export gives it

    def keeper(self, policy: str) -> Keeper:
        def load(folder: BundleFolder) -> LoadedModel:
            self.while_loading()
            content = (folder.path / "model").read_text()
            if content == "bad":
                raise IntegrityError(f"{folder.path}/model: is bad")
            if content == "worse":
                raise RuntimeError("nobody expected it")
            return cast(LoadedModel, cast(Any, Pretended(content)))

        def on_change() -> None:
            self.changes += 1

        return Keeper(self.root, self.repository, parse_policy(policy), load, on_change)

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
    kept.keeper(policy).refresh()
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
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    kept.write(2, "new")
    seen = []
    kept.while_loading = lambda: seen.append((kept.answers(), kept.states()))
    keeper.refresh()
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
    keeper = kept.keeper("latest:1")
    if not restarted:
        keeper.refresh()
    kept.write(2, content)
    keeper.refresh()
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
    keeper = kept.keeper("latest:1")
    for _ in range(3):
        keeper.refresh()
    assert kept.logged("model_refused", "model_ready") == [(1, "model_refused")]
    kept.write(1, "good")
    keeper.refresh()
    assert kept.logged("model_refused", "model_ready") == [(1, "model_refused"), (1, "model_ready")]
    assert kept.answers() == "good"


def test_a_version_replaced_by_a_bad_one_goes_on_as_it_was(kept: Kept) -> None:
    kept.write(1, "old")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    kept.write(1, "bad")
    keeper.refresh()
    keeper.refresh()
    assert kept.answers() == "old"
    assert kept.repository.models["m"][1].reason
    kept.write(1, "new")
    keeper.refresh()
    assert kept.answers() == "new"
    assert not kept.repository.models["m"][1].reason


def test_what_has_left_the_folder_is_served_no_longer(kept: Kept) -> None:
    kept.write(1, "v1")
    kept.write(2, "v2")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    (kept.root / "m" / "2" / "model").unlink()
    (kept.root / "m" / "2").rmdir()
    keeper.refresh()
    assert kept.answers() == "v1"
    (kept.root / "m" / "1" / "model").unlink()
    (kept.root / "m" / "1").rmdir()
    keeper.refresh()
    with pytest.raises(ModelNotFound):
        kept.answers()


def test_a_repository_that_cannot_be_read_changes_nothing(kept: Kept) -> None:
    kept.write(1, "v1")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    kept.root.rename(kept.root.with_name("away"))
    with pytest.raises(LayoutError):
        keeper.refresh()
    assert kept.answers() == "v1"
    kept.root.with_name("away").rename(kept.root)


def test_only_models_that_are_named_are_looked_at(kept: Kept) -> None:
    kept.write(1, "a", name="m")
    kept.write(1, "b", name="other")
    keeper = kept.keeper("latest:1")
    keeper.refresh(["m"])
    assert set(kept.repository.models) == {"m"}
    with pytest.raises(ModelNotFound):
        keeper.refresh(["none"])


def test_a_model_can_be_unloaded_and_loaded_again(kept: Kept) -> None:
    kept.write(1, "v1")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    keeper.unload("m")
    with pytest.raises(ModelNotReady, match="unloaded"):
        kept.answers()
    keeper.refresh(["m"])
    assert kept.answers() == "v1"
    with pytest.raises(ModelNotFound):
        keeper.unload("none")


def test_nothing_holds_on_to_a_version_that_was_replaced(kept: Kept) -> None:
    kept.write(1, "old")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    old = weakref.ref(kept.repository.find("m", ""))
    kept.write(2, "new")
    keeper.refresh()
    gc.collect()
    assert old() is None


def test_ten_thousand_bogus_versions_cost_no_more_than_a_few(kept: Kept) -> None:
    """Of 300 in a row, what is known is as much as of 40, and each is looked into once."""
    tried: list[int] = []
    kept.while_loading = lambda: tried.append(1)
    for version in range(1, 301):
        kept.write(version, "bad")
    kept.write(301, "good")
    keeper = kept.keeper("all")
    keeper.refresh()
    assert len(tried) == 301
    keeper.refresh()
    assert len(tried) == 301
    assert kept.states() == {301: "READY"} | dict.fromkeys(range(269, 301), "UNAVAILABLE")
    assert kept.repository.failed == 300
    assert len(kept.logged("model_refused")) == 300
    with pytest.raises(ModelNotFound, match="has no version '1'; it serves 301"):
        kept.repository.find("m", "1")
    kept.write(1, "mended")
    keeper.refresh()
    assert len(tried) == 302
    assert kept.answers("1") == "mended"
    assert kept.repository.failed == 299


def test_bogus_models_are_known_up_to_a_number_of_them(kept: Kept) -> None:
    for i in range(200):
        kept.write(1, "bad", f"n{i}")
    kept.write(1, "good", "z")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    assert len(kept.repository.models) == 129
    assert kept.repository.models["z"][1].state == "READY"
    assert kept.repository.failed == 200
    kept.write(1, "mended", "n99")
    keeper.refresh()
    assert kept.repository.models["n99"][1].state == "READY"
    assert len(kept.repository.models) in (129, 130)


def test_a_bogus_model_that_is_gone_is_no_longer_counted(kept: Kept) -> None:
    for i in range(150):
        kept.write(1, "bad", f"n{i:03}")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    for i in range(150):
        shutil.rmtree(kept.root / f"n{i:03}")
    keeper.refresh()
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
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    for number in range(200):
        keeper.unload(f"m{number}")
    assert len(kept.repository.models) == 200 + MOST_IDLE_MODELS
    with pytest.raises(ModelNotReady, match="it was unloaded; have it loaded again"):
        kept.repository.find("m199", "")


def test_a_model_is_visible_while_it_is_loading_beside_any_number_of_bad_ones(kept: Kept) -> None:
    for number in range(MOST_IDLE_MODELS + 9):
        kept.write(1, "bad", f"bad{number}")
    keeper = kept.keeper("latest:1")
    keeper.refresh()
    kept.write(1, "good")
    seen = []
    kept.while_loading = lambda: seen.append(kept.states())
    keeper.refresh(["m"])
    assert seen == [{1: "LOADING"}]


def test_a_model_that_has_failed_makes_room_for_one_that_the_policy_leaves_out(kept: Kept) -> None:
    for number in range(MOST_IDLE_MODELS + 9):
        kept.write(7, "bad", f"bad{number}")
    keeper = kept.keeper("specific:7")
    keeper.refresh()
    kept.write(1, "good")
    keeper.refresh()
    assert len(kept.repository.models) == MOST_IDLE_MODELS
    assert kept.states() == {1: "UNAVAILABLE"}
