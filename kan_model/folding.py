"""Reparametrizations folded into the tensors that they compute.

`torch.nn.utils.prune`, weight and spectral normalisation, and `torch.nn.utils.parametrize` keep a
weight as other tensors and compute it before each call. In evaluation mode it is a constant, which
is what a KANLinear is recognised by and what is exported. A state dict holds the names of those
tensors alone; a module holds the functions as well. This module reads no files.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kan_model.errors import CheckpointError

PRUNE = "torch.nn.utils.prune"
WEIGHT_NORM = "weight_norm"
SPECTRAL_NORM = "spectral_norm"
PARAMETRIZE = "torch.nn.utils.parametrize"

_ALIGNED = 0.9  # cosine; vectors of another dimension are as good as random
_HOOKS = (
    f"{PRUNE}.",
    "torch.nn.utils.weight_norm.WeightNorm",
    "torch.nn.utils.spectral_norm.SpectralNorm",
)
_PARAMETRIZED = re.compile(
    r"(?P<stem>(?:.*\.)?)parametrizations\.(?P<own>[^.]+)\."
    r"(?P<part>original\d*(?:_orig|_mask)?|\d+\..+)",
    re.DOTALL,
)
_SUFFIXED = re.compile(r"(?P<name>.*[^.])_(?:orig|mask|g|v|u)", re.DOTALL)


@dataclass(frozen=True)
class Recipe:
    """How a tensor is computed from those that a state dict holds in its place.

    Attributes:
        kind: `PRUNE`, `WEIGHT_NORM`, `SPECTRAL_NORM`, or `PARAMETRIZE` for an unknown function.
        parts: What it is computed from, in an order that `kind` defines: names of tensors, or
            recipes for them.
        others: Names of further tensors that belong to it.
    """

    kind: str
    parts: tuple["str | Recipe", ...]
    others: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Names of all tensors that it replaces."""
        inside = [{part} if isinstance(part, str) else part.names for part in self.parts]
        return set(self.others).union(*inside)


def is_foldable_hook(class_name: str) -> bool:
    """Tell whether a forward pre-hook of this class computes a weight and does nothing else."""
    return class_name.startswith(_HOOKS)


def plain_name(name: str) -> str:
    """Name the tensor that another may be a part of: `a.weight` for `a.weight_orig`."""
    while True:
        if match := _PARAMETRIZED.fullmatch(name):
            name = match["stem"] + match["own"]
        elif match := _SUFFIXED.fullmatch(name):
            name = match["name"]
        else:
            return name


def find_recipes(names: Collection[str], wanted: Iterable[str]) -> dict[str, Recipe]:
    """Find how tensors can be computed from those that there are.

    Args:
        names: Of the tensors in a state dict.
        wanted: Names of tensors.

    Returns:
        By name, for each wanted tensor that is not there, but whose parts are.
    """
    there = set(names)
    parametrized: dict[str, list[str]] = {}
    for name in names:
        if match := _PARAMETRIZED.fullmatch(name):
            parametrized.setdefault(match["stem"] + match["own"], []).append(name)
    found = {}
    for name in wanted:
        recipe = _find_recipe(name, there, parametrized)
        if isinstance(recipe, Recipe):
            found[name] = recipe
    return found


def _find_recipe(
    name: str, names: set[str], parametrized: Mapping[str, list[str]]
) -> "str | Recipe | None":
    if name in names:
        return name

    def find(part: str) -> "str | Recipe | None":
        return _find_recipe(part, names, parametrized)

    if own := parametrized.get(name):
        stem, _, last = name.rpartition(".")
        place = f"{stem}.parametrizations.{last}." if stem else f"parametrizations.{last}."
        parts = {_plain_part(key.removeprefix(place)) for key in own}
        if parts == {"original0", "original1"}:
            g, v = find(f"{place}original0"), find(f"{place}original1")
            return Recipe(WEIGHT_NORM, (g, v)) if g and v else None
        if parts == {"original", "0._u", "0._v"}:
            original = find(f"{place}original")
            vectors = f"{place}0._u", f"{place}0._v"
            return Recipe(SPECTRAL_NORM, (original, *vectors)) if original else None
        return Recipe(PARAMETRIZE, (), tuple(own))
    if f"{name}_orig" in names and f"{name}_mask" in names:
        return Recipe(PRUNE, (f"{name}_orig", f"{name}_mask"))
    if {f"{name}_u", f"{name}_v"} <= names and (original := find(f"{name}_orig")):
        return Recipe(SPECTRAL_NORM, (original, f"{name}_u", f"{name}_v"))
    if {f"{name}_g", f"{name}_g_orig"} & names and {f"{name}_v", f"{name}_v_orig"} & names:
        g, v = find(f"{name}_g"), find(f"{name}_v")
        return Recipe(WEIGHT_NORM, (g, v)) if g and v else None
    return None


def _plain_part(part: str) -> str:
    """Name a part of a parametrization without what pruning adds to it."""
    return re.sub(r"^(original\d*)_(orig|mask)$", r"\1", part)


def compute(name: str, recipe: Recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute a tensor from its parts, as its hook or parametrization does.

    Args:
        name: Of the tensor, for messages.
        recipe: From `find_recipes`.
        tensors: By name.

    Raises:
        CheckpointError: The function is not in the file, or the parts do not fit together.
    """
    if recipe.kind == PARAMETRIZE:
        raise CheckpointError(
            f"{recipe.others[0]}: {name} is parametrized by a function that is not in the file; "
            "call torch.nn.utils.parametrize.remove_parametrizations(layer, "
            f"{name.rpartition('.')[2]!r}) before saving, or give the network, with its "
            "parametrizations registered, with --model package.module:factory"
        )
    parts = [
        tensors[part] if isinstance(part, str) else compute(name, part, tensors)
        for part in recipe.parts
    ]
    computed = None
    with suppress(RuntimeError, IndexError), torch.no_grad():  # as torch says of shapes
        computed = _COMPUTE[recipe.kind](*parts)
    if computed is None:
        shapes = ", ".join(f"{part} {tuple(tensors[part].shape)}" for part in sorted(recipe.names))
        raise CheckpointError(
            f"{name}: cannot be computed from {shapes}: their shapes do not say how "
            f"{recipe.kind} combines them; call {_REMOVERS[recipe.kind]} before saving, or give "
            "the network, with the same call in it, with --model package.module:factory"
        )
    return computed


def _compute_pruned(original: Tensor, mask: Tensor) -> Tensor | None:
    return mask.to(dtype=original.dtype) * original if mask.shape == original.shape else None


def _compute_weight_norm(g: Tensor, v: Tensor) -> Tensor | None:
    """Scale v to the norms g; the shape of g says over which dimensions the norm was taken."""
    if g.dim() == 0:
        return torch._weight_norm(v, g, -1)
    for dim, size in enumerate(v.shape):
        if g.shape == tuple(size if i == dim else 1 for i in range(v.dim())):
            return torch._weight_norm(v, g, dim)
    return None


def _compute_spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor | None:
    """Divide by the largest singular value, as the stored vectors estimate it.

    Which dimension stands for the rows is not stored. Where the shapes leave a choice, it is the
    one in which the matrix maps v to the direction of u, as power iterations have left them.
    """
    matrices = [
        weight.movedim(dim, 0).reshape(size, -1)
        for dim, size in enumerate(weight.shape)
        if u.shape == (size,) and v.shape == (weight.numel() // max(size, 1),)
    ]
    if len(matrices) > 1:
        matrices = [m for m in matrices if cosine_similarity(m @ v, u, dim=0) > _ALIGNED]
    return weight / torch.dot(u, torch.mv(matrices[0], v)) if matrices else None


_REMOVERS = {
    PRUNE: "torch.nn.utils.prune.remove(layer, name)",
    WEIGHT_NORM: "torch.nn.utils.remove_weight_norm or parametrize.remove_parametrizations",
    SPECTRAL_NORM: "torch.nn.utils.remove_spectral_norm or parametrize.remove_parametrizations",
}
_COMPUTE: dict[str, Callable[..., Tensor | None]] = {
    PRUNE: _compute_pruned,
    WEIGHT_NORM: _compute_weight_norm,
    SPECTRAL_NORM: _compute_spectral_norm,
}


def fold_reparametrizations(module: nn.Module) -> dict[str, str]:
    """Remove the reparametrizations of a module and leave the weights that they compute.

    The module's outputs stay the same. What cannot be removed, because its function fails or is
    random, is left as it is. Parameters that are shared with other layers keep their values there.

    Args:
        module: In evaluation mode. It is changed in place.

    Returns:
        What was removed, by the name of the weight: `PRUNE`, `WEIGHT_NORM`, `SPECTRAL_NORM` or
        `PARAMETRIZE`.
    """
    found: dict[str, str] = {}
    for name, part in list(module.named_modules()):
        # The last hook computes what an earlier one may have registered: it goes first.
        for hook in reversed(list(part._forward_pre_hooks.values())):
            if folded := _remove_hook(part, hook):
                own, kind = folded
                found[_join(name, own)] = kind
    for name, part in list(module.named_modules()):
        if parametrize.is_parametrized(part):
            for own in list(part.parametrizations):
                if _remove_parametrization(part, own):
                    found[_join(name, own)] = PARAMETRIZE
    return {_plain_join(name): kind for name, kind in found.items()}


def _join(place: str, own: str) -> str:
    return f"{place}.{own}" if place else own


def _plain_join(name: str) -> str:
    """Name the weight where a part of its parametrization was pruned."""
    return plain_name(name) if ".parametrizations." in f".{name}" else name


def _remove_hook(module: nn.Module, hook: object) -> tuple[str, str] | None:
    """Remove a hook that computes a weight.

    Returns:
        The weight's name and what was removed; None if the hook is of another kind.
    """
    try:
        if isinstance(hook, prune.BasePruningMethod):
            own: str = hook._tensor_name
            _unshare(module, f"{own}_orig")
            prune.remove(module, own)
            return own, PRUNE
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
            return hook.name, WEIGHT_NORM
        if isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            return hook.name, SPECTRAL_NORM
    except Exception:  # a method of the user's own may fail in any way; it stays where it is
        return None
    return None


def _remove_parametrization(module: nn.Module, own: str) -> bool:
    """Remove the parametrizations of one tensor, if they give the same each time."""
    parts: nn.Module = module.parametrizations[own]  # type: ignore[index,assignment]
    is_parameter = any(isinstance(part, nn.Parameter) for part in parts.parameters())
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = (getattr(module, own).detach().clone() for _ in range(2))
            if not torch.equal(first.nan_to_num(), second.nan_to_num()):
                return False
            _unshare(parts, "original")
            # A property of the class goes with them, and copies of a module share their class.
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            parametrize.remove_parametrizations(module, own, leave_parametrized=True)
    except Exception:  # the user's own function may fail in any way
        return False
    if is_parameter and own in module._buffers:  # torch's choice for one that is frozen
        frozen = module._buffers.pop(own)
        assert frozen is not None
        module.register_parameter(own, nn.Parameter(frozen, requires_grad=False))
    return True


def _unshare(module: nn.Module, name: str) -> None:
    """Give a module a parameter object of its own, over the same values.

    torch writes the folded weight into the parameter, which another layer may share.
    """
    shared = module._parameters.get(name)
    if shared is not None:
        module._parameters[name] = nn.Parameter(shared.detach(), shared.requires_grad)


def describe_folds(folded: Mapping[str, str], shown: Callable[[Sequence[str]], str]) -> list[str]:
    """Say what was folded, in a line for each kind.

    Args:
        folded: Kinds, by the name of the weight.
        shown: Shows a list of names.
    """
    return [
        f"{kind} is folded into {shown([name for name in folded if folded[name] == kind])}"
        for kind in dict.fromkeys(folded.values())
    ]
