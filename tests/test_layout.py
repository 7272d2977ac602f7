import errno
from pathlib import Path

import pytest

from kan_bundle.errors import LayoutError
from kan_bundle.layout import (
    BundleFolder,
    check_name,
    find_bundles,
    name_from_stem,
    next_version,
    parse_version,
    require_place,
    staging,
)


def target(root: Path, version: int = 1) -> BundleFolder:
    return BundleFolder("m", version, root / "models" / "m" / str(version))


def publish(place: BundleFolder, content: str, config: str = "config", force: bool = False) -> bool:
    with staging(place) as stage:
        (stage.path / "file").write_text(content)
        return stage.publish(config, force=force)


@pytest.mark.parametrize("name", ["digits", "a", "VGG16-kan_v2.1", "0x"])
def test_usable_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "é", "-x", "a" * 129])
def test_names_that_are_no_plain_folder_are_refused(name: str) -> None:
    with pytest.raises(LayoutError, match="--name"):
        check_name(name)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("epoch=9-step=1000", "epoch-9-step-1000"),
        ("best model (final)", "best-model-final"),
        ("modèle_été", "modele_ete"),
        ("Größe", "Gro-e"),
        ("日本 kan", "kan"),
        (".hidden", "hidden"),
        ("..weights", "weights"),
        ("--version", "version"),
        ("val_loss=0.02", "val_loss-0.02"),
        ("a" * 300, "a" * 128),
        ("a" * 127 + "=b", "a" * 127),
        ("new\nline\x1b[31m", "new-line-31m"),
        ("\udcff\udcfe kan", "kan"),
        ("①②", "12"),
        ("unchanged-._", "unchanged-._"),
    ],
)
def test_a_name_is_derived_from_any_stem(stem: str, name: str) -> None:
    assert name_from_stem(stem) == check_name(name)


@pytest.mark.parametrize("stem", ["", ".", "...", "日本", "=", "--", "\udcff"])
def test_a_stem_of_which_nothing_is_left_wants_a_name(stem: str) -> None:
    with pytest.raises(LayoutError, match="choose one with --name"):
        name_from_stem(stem)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("42", 42),
        ("0", None),
        ("01", None),
        ("-1", None),
        ("1.0", None),
        ("x", None),
        ("9" * 19, None),
    ],
)
def test_versions_are_positive_integers_written_plainly(text: str, number: int | None) -> None:
    assert parse_version(text) == number


def test_a_published_version_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    place = target(tmp_path)
    publish(place, "content")
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["models/m/1/file", "models/m/config.pbtxt"]
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["m"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with staging(target(tmp_path)) as stage:
            (stage.path / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_cannot_be_written_into_is_named_and_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "/models/.export-x")

    monkeypatch.setattr("kan_bundle.layout.tempfile.mkdtemp", refuse)
    with pytest.raises(OSError, match="quota") as refused, staging(target(tmp_path)):
        pass
    assert refused.value.filename == str(tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_before_it_is_published(tmp_path: Path) -> None:
    place = target(tmp_path)
    with staging(place) as stage:
        (stage.path / "file").write_text("half")
        assert find_bundles(tmp_path / "models") == []
        stage.publish("config", force=False)
    assert find_bundles(tmp_path / "models") == [place]


def test_an_existing_version_stays_without_force(tmp_path: Path) -> None:
    place = target(tmp_path)
    publish(place, "first")
    with pytest.raises(LayoutError, match="another export published version 1 of m meanwhile"):
        publish(place, "second")
    assert (place.path / "file").read_text() == "first"
    with pytest.raises(LayoutError, match=r"version 1 of m exists; .* --force"):
        require_place(place, force=False)
    require_place(place, force=True)


@pytest.mark.parametrize("in_the_way", ["models", "models/m"])
def test_a_file_in_the_way_is_named(tmp_path: Path, in_the_way: str) -> None:
    path = tmp_path / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(LayoutError, match=f"{path}: expected a folder, found a file"):
        require_place(target(tmp_path), force=True)


def test_a_dangling_link_or_an_odd_configuration_is_named(tmp_path: Path) -> None:
    place = target(tmp_path)
    place.path.parent.mkdir(parents=True)
    place.path.symlink_to("nowhere")
    with pytest.raises(LayoutError, match="exists"):
        require_place(place, force=True)
    (place.path.parent / "config.pbtxt").mkdir()
    with pytest.raises(LayoutError, match=r"config\.pbtxt: expected a file"):
        require_place(target(tmp_path, 2), force=True)


@pytest.mark.parametrize("interruption", [SystemExit, KeyboardInterrupt, OSError])
def test_an_interrupted_replacement_keeps_the_old_version(
    tmp_path: Path, interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may arrive between moving the old version away and the new one into place."""
    place = target(tmp_path)
    publish(place, "first")
    rename = Path.rename

    def interrupted(path: Path, new: Path) -> Path:
        if new == place.path and path.parent.name.startswith(".export-") and path.name == "1":
            raise interruption
        return rename(path, new)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(interruption):
        publish(place, "second", force=True)
    assert (place.path / "file").read_text() == "first"
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["m"]


def test_force_replaces_a_version_and_its_configuration(tmp_path: Path) -> None:
    place = target(tmp_path)
    publish(place, "first", "old")
    assert publish(place, "second", "new", force=True) is False
    assert (place.path / "file").read_text() == "second"
    assert (place.path.parent / "config.pbtxt").read_text() == "new"


def test_a_tuned_configuration_is_kept_and_told(tmp_path: Path) -> None:
    publish(target(tmp_path), "first", "ours")
    (tmp_path / "models/m/config.pbtxt").write_text("tuned")
    assert publish(target(tmp_path, 2), "second", "ours") is True
    assert (tmp_path / "models/m/config.pbtxt").read_text() == "tuned"


def test_the_next_version_follows_the_highest(tmp_path: Path) -> None:
    assert next_version(tmp_path / "models", "m") == 1
    publish(target(tmp_path, 2), "")
    publish(target(tmp_path, 10), "")
    assert next_version(tmp_path / "models", "m") == 11
    publish(target(tmp_path, 10**18 - 1), "")
    with pytest.raises(LayoutError, match="is the highest"):
        next_version(tmp_path / "models", "m")


def test_only_version_folders_of_visible_models_are_found(tmp_path: Path) -> None:
    for folder in ("m/2", "m/10", "m/latest", "m/01", ".export-x/1", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README").touch()
    (tmp_path / "m" / "3").touch()
    assert [(b.name, b.version) for b in find_bundles(tmp_path)] == [("m", 2), ("m", 10)]


def test_an_unreadable_repository_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="No such file"):
        find_bundles(tmp_path / "none")
