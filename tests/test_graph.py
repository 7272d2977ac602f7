"""Model files that ask for more than a model may, by someone who can write true hashes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import kan_ops
from export import export_module
from export.conversion import onnx_graph
from kan_bundle import golden
from kan_bundle.errors import GraphError, IntegrityError
from kan_bundle.integrity import record_file
from kan_bundle.layout import BundleFolder
from kan_bundle.manifest import read_manifest, write_manifest
from kan_model import KAN
from serving.models import outline
from serving.models.graph import check_graph
from serving.models.loading import Admission, LoadedModel, load_bundle
from tests.bundles import CLOSE, FOREIGN, run_onnx
from tests.conftest import STATE_DICTS
from tests.loading import LIMITS, make_engine, unreached
from tests.wire import part

__all__ = ["unreached"]

MODEL = "uniform_4x8x3"


def load(folder: BundleFolder, admission: Admission | None = None) -> LoadedModel:
    return load_bundle(folder, make_engine, LIMITS, admission=admission or Admission())


@pytest.fixture
def folder(repository: Path, tmp_path: Path) -> BundleFolder:
    """A copy of one bundle, for an attacker."""
    shutil.copytree(repository / MODEL, tmp_path / MODEL)
    return BundleFolder(MODEL, 1, tmp_path / MODEL / "1")


@pytest.fixture
def model(folder: BundleFolder) -> onnx.ModelProto:
    return onnx.load(folder.path / "model.onnx")


def write(folder: BundleFolder, content: bytes, *more: str) -> None:
    """Put other bytes into a bundle, with a manifest that agrees.

    Args:
        more: Files to list beside those that are listed.
    """
    (folder.path / "model.onnx").write_bytes(content)
    manifest = read_manifest(folder.path)
    files = {name: record_file(folder.path / name) for name in (*manifest.files, *more)}
    write_manifest(replace(manifest, files=files), folder.path)


def tensor(name: str = "w") -> onnx.TensorProto:
    return numpy_helper.from_array(np.zeros(4, np.float32), name)


def placed(location: str = "model.onnx.data", **entries: str) -> onnx.TensorProto:
    """A tensor whose numbers lie in another file."""
    found = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    found.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": location, "offset": "0", "length": "16"} | entries).items():
        found.external_data.add(key=key, value=value)
    return found


def sparse() -> onnx.SparseTensorProto:
    indices = helper.make_tensor("", TensorProto.INT64, [1], [0])
    return helper.make_sparse_tensor(
        helper.make_tensor("w", TensorProto.FLOAT, [1], [1]), indices, [4]
    )


def constant(**attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["w"], **attributes)


def branch(*nodes: onnx.NodeProto) -> onnx.NodeProto:
    """A node that has two branches."""
    graph = helper.make_graph(nodes, "branch", [], [])
    return helper.make_node("If", ["c"], ["w"], then_branch=graph, else_branch=graph)


OWN = helper.make_node(kan_ops.OPERATOR, ["x", "k", "w"], ["y"], domain=kan_ops.DOMAIN)


# What an attacker puts somewhere, as a node, and what is said of it.
NODES = {
    "a foreign operator": (FOREIGN, "expected an operator of .*, found one of 'com.microsoft'"),
    "a foreign domain that looks like ours": (
        helper.make_node("Gelu", ["x"], ["y"], domain="kanserve\0"),
        "found one of 'kanserve",
    ),
    "a sparse constant": (constant(sparse_value=sparse()), "expected a dense tensor, found a spa"),
    "a constant in another file": (constant(value=placed("other")), "one in another file"),
    "a constant in the file of weights": (constant(value=placed()), "one in another file"),
    "tensors in another file": (
        helper.make_node("Constant", [], ["w"], value=[tensor(), placed("/etc/passwd")]),
        "one in another file",
    ),
}


PLACES = (
    "the graph",
    "a branch",
    "a branch of a branch",
    "a function",
    "a branch in a function",
    "a default of a function",
)


def put(model: onnx.ModelProto, node: onnx.NodeProto, place: str) -> None:
    """Add a node to a model at one of `PLACES`."""
    if place == "a default of a function":
        graph = helper.make_graph([node], "default", [], [])
        model.functions[0].attribute_proto.append(helper.make_attribute("default", graph))
        return
    for _ in range(place.count("branch")):
        node = branch(node)
    (model.functions[0] if "function" in place else model.graph).node.append(node)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", NODES)
@pytest.mark.usefixtures("unreached")
def test_a_node_that_asks_for_more_is_refused_wherever_it_stands(
    folder: BundleFolder, model: onnx.ModelProto, what: str, place: str
) -> None:
    node, reason = NODES[what]
    put(model, node, place)
    write(folder, model.SerializeToString())
    with pytest.raises(GraphError, match=rf"model\.onnx: .*{reason}.*; do not serve it"):
        load(folder)


WEIGHTS = {
    "another file": (placed("other.bin"), "expected weights in model.onnx.data, found a place in"),
    "a file elsewhere": (placed("../../../../etc/passwd"), "weights in model.onnx.data"),
    "an absolute path": (placed("/etc/passwd"), "weights in model.onnx.data"),
    "a longer way to the file": (placed("./model.onnx.data"), "weights in model.onnx.data"),
    "a longer name": (placed("model.onnx.data\0"), "weights in model.onnx.data"),
    "an address in memory": (placed("*/_ORT_MEM_ADDR_/*", offset="140000000000"), "weights in mod"),
    "beyond the end": (placed(offset="17"), "within the 32 bytes of .* found 16 bytes from 17 on"),
    "longer than all": (placed(length="33"), "within the 32 bytes"),
    "before the beginning": (placed(offset="-16"), "an offset and a length in bytes"),
    "a negative length": (placed(length="-1"), "an offset and a length in bytes"),
    "no number": (placed(length="0x10"), "an offset and a length in bytes"),
    "too large a number": (placed(offset="9" * 30), "an offset and a length in bytes"),
    "weights made ready by another": (
        placed(prepacked_0="key|0;16;0"),
        "location, offset and length, once each, found .*prepacked",
    ),
}


@pytest.mark.parametrize("inside", [False, True], ids=["the graph", "a branch"])
@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.usefixtures("unreached")
def test_weights_lie_in_the_one_file_and_within_it(
    folder: BundleFolder, model: onnx.ModelProto, what: str, inside: bool
) -> None:
    weight, reason = WEIGHTS[what]
    add_weight(model, weight, inside=inside)
    (folder.path / "model.onnx.data").write_bytes(bytes(32))
    write(folder, model.SerializeToString(), "model.onnx.data")
    with pytest.raises(GraphError, match=rf"tensor 'w' of .*{reason}"):
        load(folder)


def add_weight(model: onnx.ModelProto, weight: onnx.TensorProto, *, inside: bool) -> None:
    """Add a weight to the graph, or to a branch in it."""
    graph = helper.make_graph([], "branch", [], [], [weight])
    node = helper.make_node("If", ["c"], ["w"], then_branch=graph, else_branch=graph)
    model.graph.MergeFrom(
        onnx.GraphProto(node=[node]) if inside else onnx.GraphProto(initializer=[weight])
    )


@pytest.mark.parametrize("change", ["twice", "missing", "not marked", "unknown mark"])
def test_a_place_that_can_be_read_in_two_ways_is_refused(
    model: onnx.ModelProto, change: str
) -> None:
    weight = placed()
    if change == "twice":
        weight.external_data.add(key="location", value="model.onnx.data")
    elif change == "missing":
        del weight.external_data[2]
    elif change == "not marked":
        weight.ClearField("data_location")
    content = weight.SerializeToString()
    if change == "unknown mark":  # a parser of ONNX's declaration keeps the one before
        assert TensorProto.FromString(content + b"\x70\x07").data_location == TensorProto.EXTERNAL
        content = content.replace(b"model.onnx.data", b"other.onnx.data") + b"\x70\x07"
    with pytest.raises(GraphError, match="tensor 'w' of the graph"):
        check_graph(part(7, part(5, content)), 32)
    del model.graph.initializer[:]
    model.graph.initializer.append(placed())
    check_graph(model.SerializeToString(), 32)  # so it is the change that is refused


@pytest.mark.usefixtures("unreached")
def test_weights_in_a_file_that_the_manifest_does_not_list_are_refused(
    folder: BundleFolder, model: onnx.ModelProto
) -> None:
    add_weight(model, placed(), inside=False)
    (folder.path / "model.onnx.data").write_bytes(bytes(32))
    write(folder, model.SerializeToString())
    with pytest.raises(GraphError, match=r"a manifest that lists model\.onnx\.data, found one"):
        load(folder)


MODELS: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "a foreign import": (
        lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3)),
        "the model: expected operators of ONNX and of 'kanserve', found an import of 'ai.onnx.ml'",
    ),
    "a foreign import of a function": (
        lambda m: m.functions[0].opset_import.append(helper.make_opsetid("com.microsoft", 1)),
        "function 'KANLinear1': expected operators of .*'com.microsoft'",
    ),
    "a function that stands for an operator of ONNX": (
        lambda m: m.functions.append(helper.make_function("", "Relu", [], [], [], [])),
        "function 'Relu': expected domain 'kanserve', found domain ''",
    ),
    "a function that calls a function": (
        lambda m: m.functions[0].node.append(OWN),
        "expected an operator of '', 'ai.onnx', found one of 'kanserve'",
    ),
    "a function whose branch calls a function": (
        lambda m: m.functions[0].node.append(branch(OWN)),
        "expected an operator of '', 'ai.onnx', found one of 'kanserve'",
    ),
    "sparse weights": (
        lambda m: m.graph.sparse_initializer.append(sparse()),
        "the graph: expected dense weights, found sparse ones",
    ),
    "sparse weights of a branch": (
        lambda m: m.graph.node.append(
            helper.make_node(
                "If",
                ["c"],
                [],
                then_branch=onnx.GraphProto(name="b", sparse_initializer=[sparse()]),
            )
        ),
        "attribute 'then_branch' of .*: expected dense weights, found sparse ones",
    ),
    "several sparse tensors": (
        lambda m: m.graph.node.append(constant(many=[sparse(), sparse()])),
        "expected a dense tensor",
    ),
    "a reference to a sparse tensor": (
        lambda m: m.functions[0].node.append(
            onnx.NodeProto(
                op_type="Constant",
                attribute=[
                    onnx.AttributeProto(
                        name="sparse_value",
                        ref_attr_name="a",
                        type=onnx.AttributeProto.SPARSE_TENSOR,
                    )
                ],
            )
        ),
        "expected a dense tensor",
    ),
    "training": (
        lambda m: m.training_info.add(),
        "expected a graph for inference alone, found one for training",
    ),
    "no graph": (lambda m: m.ClearField("graph"), "expected an ONNX model, found one without a g"),
}


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.usefixtures("unreached")
def test_a_model_that_asks_for_more_is_refused(
    folder: BundleFolder, model: onnx.ModelProto, what: str
) -> None:
    change, reason = MODELS[what]
    change(model)
    write(folder, model.SerializeToString())
    with pytest.raises(GraphError, match=reason):
        load(folder)


@pytest.mark.parametrize("place", ["the graph", "a function"])
@pytest.mark.usefixtures("unreached")
def test_branches_in_branches_without_end_are_refused(
    folder: BundleFolder, model: onnx.ModelProto, place: str
) -> None:
    node = constant(value=tensor())
    for _ in range(25):
        graph = helper.make_graph([node], "branch", [], [])
        node = helper.make_node("If", ["c"], ["w"], then_branch=graph)
    put(model, node, place)
    write(folder, model.SerializeToString())
    with pytest.raises(GraphError, match="expected at most 64 messages in one another"):
        load(folder)


@pytest.mark.usefixtures("unreached")
def test_more_fields_than_a_model_has_are_refused(
    folder: BundleFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outline, "_MOST_FIELDS", 1000)
    write(folder, (folder.path / "model.onnx").read_bytes() + b"\x08\x0a" * 1000)
    with pytest.raises(GraphError, match="expected at most 1000 fields"):
        load(folder)


@pytest.mark.usefixtures("unreached")
def test_a_name_without_end_is_refused(folder: BundleFolder, model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "n" * 70_000
    write(folder, model.SerializeToString())
    with pytest.raises(GraphError, match="expected names of at most 65536 bytes, found one of 7"):
        load(folder)


@pytest.mark.usefixtures("unreached")
def test_a_file_that_is_too_large_is_refused_before_it_is_opened(folder: BundleFolder) -> None:
    sizes = [record.size_bytes for record in read_manifest(folder.path).files.values()]
    (folder.path / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"at most \d+ bytes, .* a larger --max-model-bytes"):
        load(folder, Admission(max_file_bytes=max(sizes) - 1))
    with pytest.raises(IntegrityError, match="cannot be read"):
        load(folder, Admission(max_file_bytes=max(sizes)))


@pytest.mark.usefixtures("unreached")
def test_a_file_that_is_longer_than_its_manifest_says_is_not_read(folder: BundleFolder) -> None:
    with (folder.path / "model.onnx").open("ab") as file:
        file.truncate(2**40)  # sparse on the disk, but not in memory
    with pytest.raises(IntegrityError, match=r"found 1099511627776: changed since"):
        load(folder)


def test_answers_that_grow_beyond_measure_are_refused(
    folder: BundleFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros((10_000, 3))
    np.savez_compressed(folder.path / "golden.npz", input_0=zeros, outputs=zeros, tolerance=zeros)
    assert (folder.path / "golden.npz").stat().st_size < 10_000
    monkeypatch.setattr(golden, "_LARGEST", 700_000)
    write(folder, (folder.path / "model.onnx").read_bytes())
    with pytest.raises(IntegrityError, match=r"it holds 7203\d\d bytes, expected at most 70"):
        load(folder)


# What must pass.


@pytest.mark.parametrize("name", [golden.name for golden in STATE_DICTS])
def test_what_is_exported_passes_and_holds_functions(repository: Path, name: str) -> None:
    folder = BundleFolder(name, 1, repository / name / "1")
    model = onnx.load(folder.path / "model.onnx")
    assert {function.domain for function in model.functions} == {kan_ops.DOMAIN}
    assert len({function.overload for function in model.functions}) == 2
    assert load(folder).engine.fused_layers == 2


def test_weights_beside_the_graph_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_INLINE", 100)
    export_module(KAN([3, 4, 2]), name="m", output=tmp_path)
    folder = BundleFolder("m", 1, tmp_path / "m" / "1")
    assert (folder.path / "model.onnx.data").exists()
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    (found,) = load(folder).engine.run([x])
    np.testing.assert_allclose(found, run_onnx(folder.path, x)[0], **CLOSE)


def test_branches_with_constants_and_weights_pass(model: onnx.ModelProto) -> None:
    add_weight(model, tensor(), inside=True)
    for place in PLACES:
        put(model, constant(value=tensor()), place)
    model.opset_import.append(helper.make_opsetid("ai.onnx", 20))
    check_graph(model.SerializeToString(), None)


# The library of kan_ops.


def test_nothing_but_the_installed_package_names_a_library(
    folder: BundleFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Libraries lie about in the version, in the working folder, and are named in the files."""
    registered: list[str] = []
    own = str(kan_ops.library_path())

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def register_custom_ops_library(self, path: str) -> None:
            registered.append(path)
            super().register_custom_ops_library(path)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.chdir(tmp_path)
    for place in (folder.path, tmp_path, tmp_path / "kan_ops"):
        place.mkdir(exist_ok=True)
        (place / "libkan_ops.so").write_bytes(b"not the library")
    model = onnx.load(folder.path / "model.onnx")
    for key in ("custom_ops_library", "kan_ops.library", "ort_config"):
        model.metadata_props.add(key=key, value=str(folder.path / "libkan_ops.so"))
    write(folder, model.SerializeToString(), "libkan_ops.so")
    assert load(folder).engine.fused_layers == 2
    assert registered == [own]
    assert not Path(own).is_relative_to(tmp_path)
