"""A state dict in the form that efficient-KAN gives it.

What other code keeps in a layer's place is folded (folding.py), and one row of knots that all
features share is repeated for each of them. This module knows tensors, and reads no files.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kan_model.errors import CheckpointError
from kan_model.folding import compute, find_recipes, plain_name
from kan_model.stacks import StateDict, is_layer_tensor

SHARED_KNOTS = "one row of knots, which all features share,"


def canonical_state(state: StateDict, check: Callable[[str, Tensor], None]) -> StateDict:
    """Give a state dict the names and shapes of efficient-KAN's layers.

    Args:
        state: As read.
        check: Refuses a tensor that cannot be worked with, given its name.

    Returns:
        The state dict, with what was done in `folded`, and in `faults` what could not be done.
    """
    tensors = dict(state.tensors)
    folded: dict[str, str] = {}
    faults: dict[str, str] = {}
    wanted = {plain for name in tensors if is_layer_tensor(plain := plain_name(name))}
    for name, recipe in find_recipes(tensors, sorted(wanted)).items():
        try:
            for part in recipe.names:
                check(state.place + part, tensors[part])
            found = compute(name, recipe, tensors)
        except CheckpointError as error:
            faults[name] = str(error)
            continue
        for part in recipe.names:
            del tensors[part]
        tensors[name] = found
        folded[name] = recipe.kind
    for name in list(tensors):
        stem = name.removesuffix("grid")
        if stem != name and (knots := repeat_knots(stem, tensors)) is not None:
            tensors[name] = knots
            folded[name] = SHARED_KNOTS
    return replace(state, tensors=tensors, folded=folded, faults=faults)


def repeat_knots(stem: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Repeat one row of knots for each input feature.

    Args:
        stem: What stands before the names of a layer's tensors.
        tensors: By name.

    Returns:
        Knots of shape (in, K), for a grid of shape (K,) or (1, K); None for any other.
    """
    base, spline, grid = (
        tensors.get(stem + name) for name in ("base_weight", "spline_weight", "grid")
    )
    if base is None or spline is None or grid is None:
        return None
    if any(t.layout is not torch.strided for t in (base, spline, grid)):
        return None
    if base.dim() != 2 or spline.dim() != 3 or grid.dim() not in (1, 2):
        return None
    features = base.shape[1]
    single = grid.dim() == 1 or (grid.shape[0] == 1 and features != 1)
    if not single or grid.shape[-1] <= spline.shape[2]:  # KANX keeps fewer knots
        return None
    return grid.detach().reshape(1, -1).expand(features, -1)
