"""A checkpoint's weights in a network of the user's own: which names may agree, and how."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export import NetworkError, export_checkpoint
from kan_model import KAN, KANLinear
from kan_model.checkpoint import read_checkpoint
from tests import zoo
from tests.states import network_of, saved


class Wrapper(nn.Module):
    """Returns the first of what a network returns, as a network of several outputs may need."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Scaled(Wrapper):
    """Has numbers of its own."""

    def __init__(self, net: nn.Module, *, persistent: bool) -> None:
        super().__init__(net)
        self.register_buffer("mean", torch.zeros(12), persistent=persistent)


def trained(seed: int = 5) -> zoo.Flattening:
    torch.manual_seed(seed)
    return zoo.Flattening().eval()


def assert_loaded(found: nn.Module, expected: nn.Module) -> None:
    x = torch.linspace(-1, 1, 36).reshape(3, 3, 4)
    assert torch.equal(found(x), expected(x))


@pytest.mark.parametrize("before", ["", "module.", "model._orig_mod."])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_wrapper_around_the_trained_network_takes_its_weights(
    tmp_path: Path, before: str, depth: int
) -> None:
    network = trained()

    def factory() -> nn.Module:
        wrapped: nn.Module = zoo.flattening_net()
        for _ in range(depth):
            wrapped = Wrapper(wrapped)
        return wrapped

    path = saved(
        tmp_path, {"epoch": 3, "state": {before + k: v for k, v in network.state_dict().items()}}
    )
    found, text = network_of(path, model=factory)
    assert_loaded(found, network)
    assert f"weights of the network inside, {'.'.join(['net'] * depth)}\n" in text


def test_the_network_inside_takes_the_weights_of_its_wrapper(tmp_path: Path) -> None:
    network = trained()
    path = saved(tmp_path, Wrapper(Wrapper(network)).state_dict())
    found, text = network_of(path, model=zoo.flattening_net)
    assert_loaded(found, network)
    assert "weights behind the prefix 'net.net.'" in text


def test_names_that_agree_as_they_are_come_first(tmp_path: Path) -> None:
    network = trained()
    content = {"a": Wrapper(network).state_dict(), "b": trained(6).state_dict()}
    found, text = network_of(saved(tmp_path, content), model=lambda: Wrapper(zoo.flattening_net()))
    assert_loaded(found, network)
    assert "weights behind the prefix 'a.'" in text
    assert "inside" not in text


def test_a_wrapper_around_weights_that_are_there_twice_wants_a_prefix(tmp_path: Path) -> None:
    network = trained()
    path = saved(tmp_path, {"model": network.state_dict(), "ema": trained(6).state_dict()})
    with pytest.raises(NetworkError, match=r"2 times, behind the prefixes 'model\.', 'ema\.'"):
        network_of(path, model=lambda: Wrapper(zoo.flattening_net()))
    found, _ = network_of(path, model=lambda: Wrapper(zoo.flattening_net()), prefix="model")
    assert_loaded(found, network)


def test_a_wrapper_does_not_take_a_part_of_a_larger_network(tmp_path: Path) -> None:
    state = trained().state_dict() | {"head.weight": torch.zeros(2, 2)}
    path = saved(tmp_path, state)
    with pytest.raises(NetworkError, match=r"unexpected in the file: .*head\.weight"):
        network_of(path, model=lambda: Wrapper(zoo.flattening_net()))
    # One layer of a KAN is such a wrapper: nothing but `layers.0.` stands before its names.
    path = saved(tmp_path, KAN([4, 3, 2]).state_dict())
    with pytest.raises(NetworkError, match="names do not agree"):
        network_of(path, model=lambda: KAN([4, 3]))


def test_a_wrapper_with_numbers_of_its_own_keeps_them_out_of_its_state(tmp_path: Path) -> None:
    network = trained()
    path = saved(tmp_path, network.state_dict())
    with pytest.raises(NetworkError, match="missing in the file: mean"):
        network_of(path, model=lambda: Scaled(zoo.flattening_net(), persistent=True))
    found, _ = network_of(path, model=lambda: Scaled(zoo.flattening_net(), persistent=False))
    assert_loaded(found, network)


@pytest.mark.parametrize("prefix", ["model_ema.", "model_ema", "model_ema.module", "ema"])
def test_a_prefix_may_end_above_the_only_place_where_the_weights_are(
    tmp_path: Path, prefix: str
) -> None:
    network = trained()
    inner = "ema." if prefix == "ema" else "model_ema."
    content = {f"{inner}module.{k}": v for k, v in network.state_dict().items()}
    content |= {f"model.{k}": v for k, v in trained(6).state_dict().items()}
    for content_of_file in (content, {"all": content}):
        path = saved(tmp_path, content_of_file)
        place = "" if content_of_file is content else "all."
        found, text = network_of(path, model=zoo.flattening_net, prefix=place + prefix)
        assert_loaded(found, network)
        assert f"weights behind the prefix '{place}{inner}module.'" in text


def test_several_sets_of_weights_below_a_prefix_are_listed(tmp_path: Path) -> None:
    network = trained()
    content = {
        "ema": {"slow": network.state_dict(), "fast": trained(6).state_dict()},
        "model": trained(7).state_dict(),
    }
    path = saved(tmp_path, content)
    with pytest.raises(NetworkError, match=r"2 times, behind the prefixes 'ema\.slow\.', 'ema\.f"):
        network_of(path, model=zoo.flattening_net, prefix="ema")
    found, _ = network_of(path, model=zoo.flattening_net, prefix="ema.slow")
    assert_loaded(found, network)


def caller_owned() -> list[Callable[[nn.Module], object]]:
    return [
        lambda net: None,
        lambda net: net.train(),
        lambda net: net.requires_grad_(False),
        lambda net: net.register_forward_hook(lambda module, inputs, output: None),
        lambda net: torch.nn.utils.prune.identity(net.kan.layers[0], "base_weight"),
        lambda net: torch.nn.utils.parametrizations.weight_norm(net.kan.layers[0], "base_weight"),
        lambda net: net(torch.zeros(2, 12)),
        lambda net: net.to("meta"),
    ]


@pytest.mark.parametrize("change", caller_owned())
def test_the_network_of_the_caller_is_not_changed(
    tmp_path: Path, change: Callable[[nn.Module], object]
) -> None:
    mine = zoo.flattening_net()
    change(mine)
    before = {
        name: (id(t), copy.deepcopy(t)) for name, t in mine.state_dict(keep_vars=True).items()
    }
    modes = [module.training for module in mine.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in mine.modules()]
    classes = [type(module) for module in mine.modules()]
    network = trained()
    found, _ = network_of(saved(tmp_path, network.state_dict()), model=lambda: mine)
    assert_loaded(found, network)
    after = mine.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert after[name].requires_grad == value.requires_grad
        assert value.is_meta or torch.equal(after[name], value)
    assert [module.training for module in mine.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in mine.modules()] == hooks
    assert [type(module) for module in mine.modules()] == classes


@pytest.mark.filterwarnings("ignore:pruned")
def test_pruning_the_export_leaves_the_network_of_the_caller(tmp_path: Path) -> None:
    mine = trained()
    before = copy.deepcopy(mine.state_dict())
    path = saved(tmp_path, mine.state_dict())
    mine.train()
    export_checkpoint(path, output=tmp_path, model=lambda: mine, input_shape="12", prune=0.9)
    assert mine.training
    assert all(torch.equal(before[name], tensor) for name, tensor in mine.state_dict().items())


def test_a_network_on_the_meta_device_takes_the_tensors_of_the_file_without_a_copy(
    tmp_path: Path,
) -> None:
    from export.factory import build_module
    from export.weights import load_weights

    checkpoint = read_checkpoint(saved(tmp_path, trained().state_dict()))

    def factory() -> nn.Module:
        with torch.device("meta"):
            return zoo.Flattening()

    module = build_module(factory)
    load_weights(module, checkpoint)
    (state,) = checkpoint.states
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == state.tensors[name].data_ptr()


def test_a_network_in_place_of_a_function_is_refused_with_the_function_to_write(
    tmp_path: Path,
) -> None:
    network: Any = trained()
    path = saved(tmp_path, network.state_dict())
    with pytest.raises(NetworkError, match=r"found the network itself.*model=lambda: network"):
        network_of(path, model=network)
    assert_loaded(network_of(path, model=lambda: network)[0], network)


def test_a_compiled_network_takes_the_weights_of_the_plain_one(tmp_path: Path) -> None:
    network = trained()
    path = saved(tmp_path, network.state_dict())
    inner = zoo.flattening_net()
    inner.kan = torch.compile(inner.kan, backend="eager")  # type: ignore[assignment]
    for made in (torch.compile(zoo.flattening_net(), backend="eager"), inner):
        found, _ = network_of(path, model=lambda made=made: made)
        plain = found.state_dict()
        for name, tensor in network.state_dict().items():
            assert any(
                torch.equal(tensor, other)
                for key, other in plain.items()
                if key.replace("_orig_mod.", "") == name
            )


class Versioned(nn.Module):
    """Keeps more than tensors in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KANLinear(4, 2)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kan(x)
        return y


def test_a_state_that_is_no_tensor_is_left_as_the_network_has_it(tmp_path: Path) -> None:
    network = Versioned()
    found, _ = network_of(saved(tmp_path, network.state_dict()), model=Versioned)
    x = torch.randn(3, 4)
    assert torch.equal(found(x), network(x))
