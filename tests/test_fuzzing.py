"""The short form of `make fuzz-wire`; see fuzzing.py."""

from itertools import islice
from pathlib import Path

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from tests import fuzzing
from tests.processes import serving

REQUESTS = 2000


@pytest.fixture(scope="module")
def found(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> fuzzing.Found:
    found = fuzzing.Found()
    flags = fuzzing.settings(tmp_path_factory.mktemp("fuzzing"))
    with serving("--model-repository", repository, *flags) as process:
        fuzzing.send(process.address, REQUESTS, seed=1, threads=4, found=found)
        assert process.popen.poll() is None
    return found


def test_every_request_ends_as_it_is_told(found: fuzzing.Found) -> None:
    assert sum(found.counts.values()) == REQUESTS
    assert found.faults == []


def test_every_kind_of_request_is_sent(found: fuzzing.Found) -> None:
    kinds = {kind for kind, _ in islice(fuzzing.cases(0), 5000)}
    rare = {"bomb", "too_large"}
    assert {kind for kind, _ in found.counts} >= kinds - rare
    assert ("raw", "OK") in found.counts


def test_an_answer_that_is_wrong_is_a_fault() -> None:
    found = fuzzing.Found()
    kind, case = next((k, c) for k, c in fuzzing.cases(2) if k == "raw" and len(c.content) > 100)
    tensor = pb.ModelInferResponse.InferOutputTensor(name="output", datatype="FP32", shape=[1, 3])
    wrong = np.full((1, 3), 9, np.float32).tobytes()
    other = pb.ModelInferResponse(outputs=[tensor], raw_output_contents=[wrong])
    found.add(kind, case, other.SerializeToString(), grpc.StatusCode.OK)
    found.add(kind, case, None, grpc.StatusCode.INTERNAL)
    assert len(found.faults) == 2
