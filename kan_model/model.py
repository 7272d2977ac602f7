"""KAN: a stack of KANLinear layers, with efficient-KAN's constructor and state-dict keys."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Self, cast

from torch import Tensor, nn

from kan_model.layer import KANLinear


class KAN(nn.Module):
    """A Kolmogorov-Arnold network, `layers.0`, `layers.1`, ... applied in turn.

    Args:
        layers_hidden: Widths from input to output, at least two.
        grid_size: See `KANLinear`, as for every argument below.
        spline_order: See `KANLinear`.
        scale_noise: See `KANLinear`.
        scale_base: See `KANLinear`.
        scale_spline: See `KANLinear`.
        base_activation: See `KANLinear`.
        grid_eps: See `KANLinear`.
        grid_range: See `KANLinear`.
        enable_standalone_scale_spline: See `KANLinear`. Upstream's `KAN` does not offer it.

    Raises:
        ValueError: An argument is out of its range.
    """

    layers: Sequence[KANLinear]

    def __init__(
        self,
        layers_hidden: Sequence[int],
        grid_size: int = 5,
        spline_order: int = 3,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        base_activation: Callable[[], nn.Module] = nn.SiLU,
        grid_eps: float = 0.02,
        grid_range: Sequence[float] = (-1.0, 1.0),
        *,
        enable_standalone_scale_spline: bool = True,
    ) -> None:
        super().__init__()
        if len(layers_hidden) < 2:
            raise ValueError(
                "layers_hidden needs at least an input and an output width, "
                f"found {list(layers_hidden)}"
            )
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.layers = _module_list(
            KANLinear(
                in_features,
                out_features,
                grid_size=grid_size,
                spline_order=spline_order,
                scale_noise=scale_noise,
                scale_base=scale_base,
                scale_spline=scale_spline,
                enable_standalone_scale_spline=enable_standalone_scale_spline,
                base_activation=base_activation,
                grid_eps=grid_eps,
                grid_range=grid_range,
            )
            for in_features, out_features in pairwise(layers_hidden)
        )

    @classmethod
    def from_layers(cls, layers: Sequence[KANLinear]) -> Self:
        """Stack layers that exist, which may differ in grid size, order and scaler.

        Args:
            layers: At least one; each one's `out_features` is the next one's `in_features`.

        Returns:
            A network that holds these very layers.

        Raises:
            ValueError: There is no layer, or two neighbours do not fit.
        """
        if not layers:
            raise ValueError("a KAN needs at least one layer")
        for i, (left, right) in enumerate(pairwise(layers)):
            if left.out_features != right.in_features:
                raise ValueError(
                    f"layers.{i} gives {left.out_features} features, "
                    f"layers.{i + 1} takes {right.in_features}"
                )
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network.grid_size = layers[0].grid_size
        network.spline_order = layers[0].spline_order
        network.layers = _module_list(layers)
        return network

    def forward(self, x: Tensor, update_grid: bool = False) -> Tensor:
        """Apply the layers in turn.

        Args:
            x: Inputs, shape (..., layers_hidden[0]).
            update_grid: Whether each layer first adapts its grid to what reaches it. For training
                only: it changes the model.

        Returns:
            Outputs, shape (..., layers_hidden[-1]).

        Raises:
            ValueError: The last dimension of `x` is not the first width.
        """
        for layer in self.layers:
            if update_grid:
                layer.update_grid(x)
            x = layer(x)
        return x

    def regularization_loss(
        self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0
    ) -> Tensor:
        """Sum the layers' `KANLinear.regularization_loss`, a scalar."""
        losses = [
            layer.regularization_loss(regularize_activation, regularize_entropy)
            for layer in self.layers
        ]
        return sum(losses[1:], start=losses[0])


def _module_list(layers: Iterable[KANLinear]) -> Sequence[KANLinear]:
    """Make a ModuleList, and tell type checkers what is in it."""
    return cast(Sequence[KANLinear], nn.ModuleList(layers))
