"""What is given as an input and is no array: in the tree of errors, with what to do."""

from typing import Any

import numpy as np
import pytest
import torch

from serving.client import InvalidRequest
from serving.server import Server
from tests.clients import UNIFORM, assert_close, both_ways, infers


class Failing:
    """An object that fails when numpy asks for its array."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __array__(self, *_: object, **__: object) -> Any:
        raise self._error


class Giving:
    """An object that gives numpy something."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def __array__(self, *_: object, **__: object) -> Any:
        return self._given


TENSOR = torch.from_numpy(UNIFORM.x).requires_grad_()
DETACH = "; pass x.detach().cpu().numpy(), and x.float() in place of x if numpy has no such type"
PLAIN = "; pass numbers, or an array of them"
MIXED = np.array([[1, 2, 3, None]], object)


@pytest.mark.parametrize(
    ("x", "found", "remedy"),
    [
        pytest.param(TENSOR, "torch.Tensor, which cannot be made one: Can't", DETACH, id="grad"),
        pytest.param(list(TENSOR), "list, which cannot be made one: Can't call", DETACH, id="list"),
        pytest.param([list(r) for r in TENSOR], "list, which cannot", DETACH, id="list of lists"),
        pytest.param(TENSOR.bfloat16().detach(), "unsupported ScalarType", DETACH, id="bfloat16"),
        pytest.param(torch.eye(4).to_sparse(), "Sparse layout", DETACH, id="sparse"),
        pytest.param(torch.zeros(2, 4, device="meta"), "meta device", DETACH, id="elsewhere"),
        pytest.param(Failing(KeyError("gone")), "Failing, which cannot be", PLAIN, id="fails"),
        pytest.param(Failing(RuntimeError()), "made one: RuntimeError", PLAIN, id="without words"),
        pytest.param(Failing(AttributeError("a\nb")), "made one: a b", PLAIN, id="two lines"),
        pytest.param(Giving(3), "Giving, which cannot be made one: ", PLAIN, id="no array"),
        pytest.param(Giving(MIXED), "Giving, which numpy makes Python objects", "", id="objects"),
        pytest.param(MIXED, "numpy.ndarray, which numpy makes Python", "", id="array of objects"),
        pytest.param(None, "NoneType, which numpy makes", "np.asarray(x, float32)", id="none"),
        pytest.param({1.0, 2.0}, "set, which numpy makes", "np.asarray(x, float32)", id="set"),
        pytest.param((i for i in range(4)), "generator, which numpy", "", id="generator"),
        pytest.param([[1, 2, 3, 10**30]], "list, which numpy makes", "", id="very large number"),
        pytest.param([[1, 2, 3, 4], [5]], "list, which cannot be made one: ", PLAIN, id="ragged"),
    ],
)  # fmt: skip
def test_what_is_no_array_is_told_with_what_to_do(
    server: Server, x: Any, found: str, remedy: str
) -> None:
    before = infers(server)
    for inputs in (x, {"input": x}):
        for error in both_ways(server.address, "infer", UNIFORM.name, inputs):
            assert isinstance(error, InvalidRequest)
            assert "input 'input': expected an array" in str(error)
            assert found in str(error)
            assert remedy in str(error)
            assert "\n" not in str(error)
    assert infers(server) == before


def test_what_the_message_says_to_do_works(server: Server) -> None:
    for x in (
        TENSOR.detach().cpu().numpy(),
        TENSOR.detach(),
        Giving(UNIFORM.x),
        UNIFORM.x.tolist(),
    ):
        for found in both_ways(server.address, "infer", UNIFORM.name, x):
            assert_close(found, UNIFORM.y64)
