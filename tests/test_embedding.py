"""The numbers within a report's page: written, read back, and refused where damaged."""

import base64
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.curves import (
    importance,
    layer_curves,
)
from export.report_page.diagram import make_diagram
from export.report_page.embedding import LayerData, embed, read_embedded, share_room
from kan_model import KAN, KANLinear
from tests.conftest import Golden
from tests.layers import golden_layers


def data(layer: KANLinear, name: str = "layer") -> LayerData:
    (room,) = share_room([layer])
    curves = layer_curves(
        name,
        layer,
        importance(layer),
        sampled=False,
        most_edges=room.edges,
        most_inputs=room.inputs,
    )
    return LayerData(curves, np.ones(len(curves.inputs)), None)


def block(text: str) -> bytes:
    return f'<script type="application/json" id="data">{text}</script>'.encode()


def test_a_report_gives_back_the_curves_to_float32(golden: Golden) -> None:
    layers = [data(layer) for layer in golden_layers(golden)]
    found, chain = read_embedded(block(embed(layers, chain=True)))
    assert chain
    for one, other in zip(layers, found, strict=True):
        np.testing.assert_array_equal(one.curves.edges, other.edges)
        for place in (0, len(other.edges) - 1):
            expected, read = one.curves.curve(place), other.curve(place)
            np.testing.assert_allclose(read.x, expected.x, rtol=1e-7)
            size = np.abs(expected.total).max()
            np.testing.assert_allclose(read.total, expected.total, atol=2e-6 * size)


def test_a_name_cannot_end_the_block() -> None:
    name = "</script><script>alert(1)</script><!--"
    text = embed([data(KANLinear(2, 2), name)], chain=False)
    assert "<" not in text
    assert read_embedded(block(text))[0][0].name == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<p>another page</p>", "no curves"),
        (block('{"format": 2, "layers": []}'), "format 1, found 2"),
        (block("[]"), "format 1, found None"),
        (block('{"format": 1, "chain": true, "layers": [{"name": "a"}]}'), "damaged"),
        (block("{"), "damaged"),
        (block("[" * 100_000), "damaged"),
    ],
)
def test_what_is_no_report_is_refused_in_plain_words(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_embedded(content)


NUMBERS: tuple[object, ...] = (0, -1, 1, 2, 5, 10**6, 10**30, None, "x", float("inf"), [], {})
CHANGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda raw: raw[:-4],
    lambda raw: raw + raw[-4:],
    lambda raw: raw + bytes(1),
    lambda raw: b"",
    lambda raw: b"\xff" * len(raw),
    lambda raw: bytes(len(raw)),
    lambda raw: raw[-4:] + raw[4:-4] + raw[:4],
)


@pytest.mark.parametrize(
    ("key", "value"), [(key, n) for key in ("in", "out", "order", "steps", "name") for n in NUMBERS]
)
def test_a_damaged_number_is_refused_or_does_no_harm(key: str, value: object) -> None:
    content = json.loads(embed([data(layer, "a") for layer in KAN([3, 2, 3]).layers], chain=True))
    content["layers"][0][key] = value
    assert_refused_or_drawn(content)


@pytest.mark.parametrize(
    "key", ["inputs", "knots", "activation", "edges", "importance", "base", "spline"]
)
def test_a_damaged_array_is_refused_or_does_no_harm(key: str) -> None:
    for change in CHANGES:
        kan = KAN([3, 2, 3])
        content = json.loads(embed([data(layer, "a") for layer in kan.layers], chain=True))
        raw = base64.b64decode(content["layers"][0][key])
        content["layers"][0][key] = base64.b64encode(change(raw)).decode()
        assert_refused_or_drawn(content)


def assert_refused_or_drawn(content: object) -> None:
    try:
        layers, _ = read_embedded(block(json.dumps(content)))
    except ValueError as error:
        if "damaged" not in str(error):
            raise
        return
    assert make_diagram(layers).edges
    for layer in layers:
        for place in range(len(layer.edges)):
            assert np.isfinite(layer.curve(place).x).all()
            knots = layer.knots_of(layer.ends(place)[0])
            assert knots[0] < knots[-1]


def test_small_layers_are_there_as_a_whole_and_large_ones_in_part() -> None:
    kan = KAN([784, 64, 10])
    rooms = share_room(list(kan.layers))
    for room, layer in zip(rooms, kan.layers, strict=True):
        assert room.edges >= layer.in_features * layer.out_features
        assert room.inputs >= layer.in_features
    with torch.device("meta"):
        large = KANLinear(4096, 4096)
    large.grid = KANLinear(4096, 1).grid
    both = share_room([kan.layers[1], large])
    assert both[0].edges >= 640
    numbers: NDArray[np.int64] = np.array([both[1].edges * 11, both[1].inputs])
    assert numbers[0] * 4 < 2.5e6
