"""Rows outside of the grid that a model was trained on: found, counted and told."""

import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kan_bundle.manifest import InputRange, read_manifest, write_manifest
from serving.grid import Grid
from tests.bundles import publish
from tests.conftest import STATE_DICTS
from tests.servers import served
from tests.wire import raw_request

ADAPTED = STATE_DICTS[1]  # ends of its own for each feature

number = st.one_of(
    st.floats(-3, 3, width=32), st.sampled_from([-1.0, 1.0, 2.0, np.nan, np.inf, -np.inf])
)


@given(rows=st.lists(st.tuples(number, number), max_size=8))
def test_a_row_is_outside_if_any_feature_is(rows: list[tuple[float, float]]) -> None:
    low, high = (-1.0, 0.5), (1.0, 2.0)
    expected = sum(
        not all(lo <= value <= hi for lo, value, hi in zip(low, row, high, strict=True))
        for row in rows
    )
    x = np.array(rows, np.float32).reshape(-1, 2)
    assert Grid(InputRange(low, high)).count_outside([x]) == expected
    assert Grid(InputRange(low, high)).count_outside([x.reshape(-1, 2, 1)]) == expected


def test_they_are_counted_and_told_to_who_asks(repository: Path) -> None:
    ends = read_manifest(repository / ADAPTED.name / "1").input_range
    assert ends is not None
    x = np.repeat(np.array([ends.low], np.float32), 6, axis=0)
    x[1, 0] = np.nextafter(x[1, 0], -np.inf)  # lower than the lowest knot
    x[2] = ends.high
    x[4, 3] = np.nan
    with served(repository) as (server, stub):
        request = raw_request(x, ADAPTED.name)
        assert not stub.ModelInfer(request).parameters
        request.parameters["kanserve_details"].bool_param = True
        told = stub.ModelInfer(request).parameters
        assert told["out_of_grid_rows"].int64_param == 2
        assert told["batch_rows"].int64_param == 6
        assert told["provider"].string_param == "cpu"
        assert told["fused_layers"].int64_param == 2
        assert told["queue_us"].int64_param >= 0
        assert told["compute_us"].int64_param > 0
        files = read_manifest(repository / ADAPTED.name / "1").files
        assert told["model_sha256"].string_param == files["model.onnx"].sha256
        with urllib.request.urlopen(
            f"http://{server.metrics_address}/metrics", timeout=10
        ) as response:
            families = text_string_to_metric_families(response.read().decode())
            counts = {
                sample.name: sample.value
                for family in families
                for sample in family.samples
                if sample.labels.get("model") == ADAPTED.name
                and sample.name.endswith("_rows_total")
            }
        assert counts == {"kanserve_rows_total": 12, "kanserve_out_of_grid_rows_total": 4}


def test_a_model_without_a_grid_at_its_inputs_has_no_count(
    repository: Path, tmp_path: Path
) -> None:
    """As of a network with other layers in front: 0 would say that all rows lie inside."""
    folder = publish(repository / ADAPTED.name / "1", tmp_path / "conv", 1)
    write_manifest(replace(read_manifest(folder), input_range=None), folder)
    with served(tmp_path) as (server, stub):
        request = raw_request(ADAPTED.x + 100, "conv")
        request.parameters["kanserve_details"].bool_param = True
        assert "out_of_grid_rows" not in stub.ModelInfer(request).parameters
        value = server.registry.get_sample_value
        assert value("kanserve_rows_total", {"model": "conv"}) == len(ADAPTED.x)
        assert value("kanserve_out_of_grid_rows_total", {"model": "conv"}) is None


def test_details_are_left_out_unless_asked_for(repository: Path) -> None:
    with served(repository) as (_, stub):
        request = raw_request(ADAPTED.x, ADAPTED.name)
        request.parameters["kanserve_details"].bool_param = False
        assert not stub.ModelInfer(request).parameters
