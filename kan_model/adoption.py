"""Somebody else's KANLinear, recognised by its attributes, to ours over the very same tensors.

Efficient-KAN has been copied into many projects under many names; what makes a layer one of its
kind is what it holds. That ours then computes the same is for the caller to check: a class can hold
the same and compute something else. This module runs nothing of the other class.
"""

from torch import Tensor, nn

from kan_model.activations import as_module
from kan_model.errors import CheckpointError
from kan_model.layer import KANLinear
from kan_model.stacks import REQUIRED, Layer
from kan_model.state_dict import empty_layer, infer_shape

_OPTIONAL = ("spline_scaler", "symbolic_mask")


def adopt(module: nn.Module) -> KANLinear | None:
    """Make our layer of one that holds what efficient-KAN's does.

    Args:
        module: Any module. It is not changed, and not run.

    Returns:
        A layer without hooks that shares the module's tensors, which is the module itself if it is
        ours and has none; None if the module is of another kind, or has edges replaced by symbolic
        functions.
    """
    if type(module) is KANLinear and not is_altered(module):
        return module
    own: dict[str, Tensor] = dict(module.named_buffers(recurse=False))
    own |= dict(module.named_parameters(recurse=False))
    # A grid that is no buffer does not travel with the weights, but it is there.
    grid = getattr(module, "grid", None)
    if isinstance(grid, Tensor):
        own["grid"] = grid
    if not set(REQUIRED) <= set(own) <= {*REQUIRED, *_OPTIONAL}:
        return None
    mask = own.pop("symbolic_mask", None)
    if (mask is not None and bool(mask.any())) or getattr(module, "symbolic_funs", None):
        return None
    children = dict(module.named_children())
    activation = children.pop("base_activation", None) or getattr(module, "base_activation", None)
    if children or not callable(activation):
        return None
    if getattr(module, "enable_standalone_scale_spline", "spline_scaler" in own) is False:
        own.pop("spline_scaler", None)
    try:
        shape = infer_shape(Layer("", own))
    except CheckpointError:
        return None
    for name in ("in_features", "out_features", "grid_size", "spline_order"):
        if getattr(module, name, getattr(shape, name)) != getattr(shape, name):
            return None
    if not isinstance(activation, nn.Module):
        activation = as_module(activation)
    layer = empty_layer(shape, activation)
    for name, tensor in own.items():
        if isinstance(tensor, nn.Parameter) and name != "grid":
            setattr(layer, name, tensor)
        elif name == "grid":
            layer.grid = tensor.detach()
        else:
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer.train(module.training)


def is_altered(module: nn.Module) -> bool:
    """Tell whether hooks or a `forward` of its own may change what a module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
