"""KANs whose edges differ in importance, and what leaving some out means by the definition."""

import numpy as np
import torch
from torch import Tensor, nn

from export.curves import importance
from kan_model import KAN
from tests import oracle


def uneven(widths: list[int], seed: int = 0, **options: object) -> KAN:
    """A KAN whose edges differ in importance by five powers of ten."""
    torch.manual_seed(seed)
    kan = KAN(widths, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in kan.layers:
            nn.init.normal_(layer.spline_weight)
            size = 10 ** -(5 * torch.rand_like(layer.base_weight))
            layer.base_weight.mul_(size)
            layer.spline_weight.mul_(size[..., None])
    return kan


def arrays(kan: KAN) -> dict[str, np.ndarray]:
    return {key: value.double().numpy().copy() for key, value in kan.state_dict().items()}


def zeroed(kan: KAN, threshold: float, samples: Tensor | None = None) -> dict[str, np.ndarray]:
    """The weights with the edges left out, by the definition of a threshold."""
    state = arrays(kan)
    for i, layer in enumerate(kan.layers):
        found = importance(layer, samples).numpy()
        out = found <= threshold * found.max()
        state[f"layers.{i}.base_weight"][out] = 0
        state[f"layers.{i}.spline_weight"][out] = 0
        if samples is not None:
            samples = layer(samples).detach()
    return state


def means(kan: KAN, threshold: float, samples: Tensor | None = None) -> list[np.ndarray]:
    """What the edges left out of each layer add on average, edge by edge and point by point."""
    state, found = arrays(kan), []
    for n, layer in enumerate(kan.layers):
        share = importance(layer, samples).numpy()
        out = share <= threshold * share.max()
        knots, order = layer.grid.double().numpy(), layer.spline_order
        offset = np.zeros(layer.out_features)
        for o, i in np.argwhere(out):
            if samples is not None:
                points = samples[:, i].double().numpy()
            else:  # the middles of equal parts of the grid
                low, high = knots[i, order], knots[i, order + layer.grid_size]
                points = low + (high - low) * (np.arange(64) + 0.5) / 64
            one = {
                f"layers.0.{name}": state[f"layers.{n}.{name}"][o : o + 1, i : i + 1]
                for name in ("base_weight", "spline_weight", "spline_scaler")
            } | {"layers.0.grid": knots[i : i + 1]}
            offset[o] += oracle.kan(one, points[:, None], oracle.silu).mean()
        found.append(offset)
        if samples is not None:
            samples = layer(samples).detach()
    return found


def pruned(
    kan: KAN, threshold: float, rows: np.ndarray, samples: Tensor | None = None
) -> np.ndarray:
    """The answers without the edges left out, and with what they add on average."""
    state, values = zeroed(kan, threshold, samples), rows
    for n, offset in enumerate(means(kan, threshold, samples)):
        mark = f"layers.{n}."
        own = {
            k.replace(mark, "layers.0."): value for k, value in state.items() if k.startswith(mark)
        }
        values = oracle.kan(own, values, oracle.silu) + offset
    return values


def within(kan: KAN, rows: int = 40) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, (rows, kan.layers[0].in_features)).astype(np.float32)


class WithKAN(nn.Module):
    """A KAN between other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 4)
        self.head = uneven([4, 6, 2])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.before(x))) + 1  # type: ignore[no-any-return]
