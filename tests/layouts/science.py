"""Operators, physics and coordinates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Arrays, Layout, normal, seeded


class _DeepONet(nn.Module):
    """Branch and trunk KANs, `einsum` of the two, one bias (rohan-v-thorat/KAN-DeepONet)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.trunk = KAN([10, 8, 6]), KAN([2, 8, 6])
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bk,bnk->bn", self.branch(u), self.trunk(y)) + self.b


def deeponet() -> nn.Module:
    """Every row has its own places."""
    return seeded(_DeepONet)


def _fields(rng: np.random.Generator) -> Arrays:
    places = rng.uniform(-1, 1, (12, 7, 2)).astype(np.float32)
    return {"u": normal(rng, 12, 10), "y": places}


class _SharedTrunk(_DeepONet):
    """The places are the same for every row: (points, 2), not a batch (DeepOKAN)."""

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bk,nk->bn", self.branch(u), self.trunk(y)) + self.b


def deeponet_shared_trunk() -> nn.Module:
    return seeded(_SharedTrunk)


def _shared_places(rng: np.random.Generator) -> Arrays:
    places = rng.uniform(-1, 1, (7, 2)).astype(np.float32)
    return {"u": normal(rng, 12, 10), "y": places}


class _FixedPlaces(_DeepONet):
    """The shared places are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.linspace(-1, 1, 14).view(7, 2))

    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        places: Any = self.places
        return torch.einsum("bk,nk->bn", self.branch(u), self.trunk(places)) + self.b


def deeponet_fixed_places() -> nn.Module:
    return seeded(_FixedPlaces)


class _SpectralConv(nn.Module):
    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(
            torch.randn(channels, channels, modes, dtype=torch.cfloat) / channels
        )

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros(
            x.shape[0], x.shape[1], x.size(-1) // 2 + 1, device=x.device, dtype=torch.cfloat
        )
        kept = spectrum[:, :, : self.modes]
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", kept, self.weight)
        return torch.fft.irfft(out, n=x.size(-1))


class _RealSpectralConv(nn.Module):
    """The same on real and imaginary parts; the transforms are products with cosines and sines."""

    there: Tensor
    back: Tensor

    def __init__(self, channels: int, modes: int, size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, channels, channels, modes) / channels)
        there = torch.view_as_real(torch.fft.rfft(torch.eye(size))[:, :modes])
        ones = torch.eye(size // 2 + 1)[:modes]
        back = torch.stack([torch.fft.irfft(ones, n=size), torch.fft.irfft(ones * 1j, n=size)])
        self.register_buffer("there", there.permute(2, 0, 1).contiguous(), persistent=False)
        self.register_buffer("back", back, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        real, imaginary = x @ self.there[0], x @ self.there[1]
        a, b = self.weight[0], self.weight[1]

        def mix(part: Tensor, weight: Tensor) -> Tensor:
            return torch.einsum("bix,iox->box", part, weight)

        return (mix(real, a) - mix(imaginary, b)) @ self.back[0] + (
            mix(real, b) + mix(imaginary, a)
        ) @ self.back[1]


class _FNO(nn.Module):
    """Fourier layers with complex weights, KANs to lift and project (FNO-KAN, KANO)."""

    def __init__(self, conv: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.lift, self.project = KANLinear(2, 6), KAN([6, 8, 1])
        self.spectral = nn.ModuleList(conv(6, 4) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(6, 6, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, x.shape[1], device=x.device).reshape(1, -1, 1)
        x = self.lift(torch.cat([x, grid.repeat(x.shape[0], 1, 1)], dim=-1)).permute(0, 2, 1)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = nn.functional.gelu(spectral(x) + local(x))
        return self.project(x.permute(0, 2, 1))


def fno() -> nn.Module:
    return seeded(lambda: _FNO(_SpectralConv))


def fno_as_products() -> nn.Module:
    """The network of `fno`, with its weights as real and imaginary parts."""
    real = _FNO(_RealSpectralConv)
    state = fno().state_dict()
    for name, value in state.items():
        if value.is_complex():
            state[name] = torch.view_as_real(value).movedim(-1, 0)
    real.load_state_dict(state)
    return real.eval()


class _PINN(nn.Module):
    """Coordinates as inputs of their own, scaled; a hard boundary condition (pikano)."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KAN([2, 8, 1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        u = self.kan(torch.cat([2 * x - 1, 2 * t - 1], dim=1))
        return torch.sin(torch.pi * x) + t * x * (1 - x) * u


def pinn() -> nn.Module:
    return seeded(_PINN)


class _Forces(nn.Module):
    """Energy, and forces as its gradient inside forward (KAN potentials)."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KAN([6, 8, 1])

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_(True)
            energy = self.kan(torch.tanh(positions))
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return energy.detach(), -gradient.detach()


def forces() -> nn.Module:
    return seeded(_Forces)


class _NeuralODE(nn.Module):
    """Fixed Runge-Kutta steps of a KAN vector field, all states returned (KAN-ODEs)."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.steps, self.dt = KAN([3, 6, 2], grid_size=4), 4, 0.1

    def derivative(self, t: float, y: Tensor) -> Tensor:
        time = torch.full_like(y[:, :1], t)
        return self.field(torch.cat([torch.tanh(y), time], dim=-1))

    def forward(self, y0: Tensor) -> Tensor:
        states, y = [y0], y0
        for i in range(self.steps):
            t, h = i * self.dt, self.dt
            k1 = self.derivative(t, y)
            k2 = self.derivative(t + h / 2, y + h / 2 * k1)
            k3 = self.derivative(t + h / 2, y + h / 2 * k2)
            k4 = self.derivative(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            states.append(y)
        return torch.stack(states, dim=1)


def neural_ode() -> nn.Module:
    return seeded(_NeuralODE)


class _NeRF(nn.Module):
    """Positional encoding of places and directions, density and colour (X-KANeRF)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.density, self.colour = KAN([15, 10, 8]), KANLinear(8, 1), KAN([17, 6, 3])

    @staticmethod
    def encode(x: Tensor, count: int = 2) -> Tensor:
        powers = 2.0 ** torch.arange(count, device=x.device)
        angles = (x[..., None] * powers * torch.pi).flatten(-2)
        return torch.cat([x, angles.sin(), angles.cos()], dim=-1)

    def forward(self, positions: Tensor, directions: Tensor) -> dict[str, Tensor]:
        h = self.trunk(self.encode(positions))
        norm = nn.functional.normalize(directions, dim=-1)
        rgb = self.colour(torch.cat([h, self.encode(norm, 1)], dim=-1))
        return {"rgb": rgb.sigmoid(), "sigma": torch.nn.functional.softplus(self.density(h) - 1)}


def nerf() -> nn.Module:
    return seeded(_NeRF)


class _Channel(nn.Module):
    """A complex signal as real pairs in and out: complex products between KANs (KAN receivers)."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.real, self.imaginary = KANLinear(6, 6), KANLinear(6, 6)

    def forward(self, iq: Tensor) -> Tensor:
        gain = torch.complex(self.real(iq[..., 0]), self.imaginary(iq[..., 1]))
        y = torch.view_as_complex(iq.contiguous()) * gain
        return torch.view_as_real(y) if self.pairs else y


def channel() -> nn.Module:
    return seeded(lambda: _Channel(pairs=True))


def channel_complex() -> nn.Module:
    """Returns complex64."""
    return seeded(lambda: _Channel(pairs=False))


def _points(*names: str, width: int = 1) -> Any:
    return lambda rng: {name: rng.random((20, width), np.float32) for name in names}


LAYOUTS = (
    Layout(deeponet, 4, samples=_fields),
    Layout(
        deeponet_shared_trunk,
        4,
        samples=_shared_places,
        refusal="rows",
        remedy=Layout(deeponet_fixed_places, 4, shape=10),
    ),
    Layout(
        fno,
        3,
        shape=(16, 1),
        refusal="complex numbers",
        remedy=Layout(fno_as_products, 3, shape=(16, 1)),
    ),
    Layout(pinn, 2, samples=_points("x", "t")),
    Layout(forces, 0, shape=6),
    Layout(neural_ode, 2, shape=2),
    Layout(nerf, 5, samples=_points("positions", "directions", width=3)),
    Layout(channel, 2, samples=lambda rng: {"iq": normal(rng, 16, 6, 2)}),
    Layout(
        channel_complex,
        2,
        samples=lambda rng: {"iq": normal(rng, 16, 6, 2)},
        refusal="complex64",
        remedy=Layout(channel, 2, samples=lambda rng: {"iq": normal(rng, 16, 6, 2)}),
    ),
)
