"""Autoencoders, generators and diffusion steps."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Arrays, Layout, normal, seeded


def autoencoder() -> nn.Module:
    """A KAN encoder and decoder over signals (SekiroRong/KAN-AutoEncoder)."""
    return seeded(lambda: nn.Sequential(KAN([24, 10, 3]), nn.Tanh(), KAN([3, 10, 24])))


class _VAE(nn.Module):
    """KAN encoder and decoder with a reparameterisation (Youngsiii/KAN_VAE_MNIST)."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws = draws
        self.encoder, self.decoder = KAN([16, 8]), KAN([3, 8, 16])
        self.fc_mu, self.fc_var = nn.Linear(8, 3), nn.Linear(8, 3)

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        if not (self.draws or self.training):
            return mu
        std = torch.exp(0.5 * log_var)
        return mu + torch.randn_like(std) * std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x.view(-1, 16))
        mu, log_var = self.fc_mu(h), self.fc_var(h)
        y = torch.sigmoid(self.decoder(self.reparameterize(mu, log_var)))
        return y.view(-1, 1, 4, 4), mu, log_var


def vae() -> nn.Module:
    """Takes the mean in evaluation mode."""
    return seeded(lambda: _VAE(draws=False))


def vae_that_draws() -> nn.Module:
    """Draws in evaluation mode as well, as tutorials have it."""
    return seeded(lambda: _VAE(draws=True))


class _Generator(nn.Module):
    """Noise and a class to an image: KAN, transposed convolutions, tanh (KAN-GAN projects)."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.kan = nn.Embedding(4, 3), KAN([8, 10, 16])
        self.up = nn.Sequential(
            nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(True),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 1, 3, padding=1)),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        h = self.kan(torch.cat([z, self.label(label)], dim=1))
        return self.up(h.view(h.size(0), 4, 2, 2))


def generator() -> nn.Module:
    return seeded(_Generator)


class _Discriminator(nn.Module):
    """Patches to one number a row (GAN-KAN projects)."""

    def __init__(self, counts: bool = False, squeezes: bool = False) -> None:
        super().__init__()
        self.counts, self.squeezes = counts, squeezes
        self.conv = nn.Conv2d(1, 4, 4, 2, 1)
        self.kan = KAN([64, 6, 1])

    def forward(self, img: Tensor) -> Tensor:
        x = functional.leaky_relu(self.conv(img), 0.2, inplace=True)
        x = self.kan(x.reshape(len(img) if self.counts else img.shape[0], -1))
        return x.squeeze() if self.squeezes else x.squeeze(1)


def discriminator() -> nn.Module:
    return seeded(_Discriminator)


def discriminator_of_len() -> nn.Module:
    """Takes `len` of a tensor, which tracing fixes."""
    return seeded(lambda: _Discriminator(counts=True))


def discriminator_squeezed() -> nn.Module:
    """Squeezes every dimension, also a batch of one."""
    return seeded(lambda: _Discriminator(squeezes=True))


class _DiffusionStep(nn.Module):
    """An image and a timestep of shape (B,): sinusoids, KAN, group norm (U-KAN's diffusion)."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.conv1 = KAN([8, 12, 6]), nn.Conv2d(1, 6, 3, padding=1)
        self.norm, self.conv2 = nn.GroupNorm(3, 6), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = 4
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * rates[None].to(t.device)
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        h = self.conv1(x) + embedded[:, :, None, None]
        return self.conv2(functional.silu(self.norm(h)))


def diffusion_step() -> nn.Module:
    return seeded(_DiffusionStep)


def _steps(rng: np.random.Generator) -> Arrays:
    return {"x": normal(rng, 12, 1, 6, 6), "t": rng.integers(0, 1000, 12)}


class _Codebook(nn.Module):
    """Vector quantisation: the nearest of a codebook, straight-through (VQ-VAE-KAN)."""

    codebook: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = KANLinear(8, 4), KANLinear(4, 8)
        self.register_buffer("codebook", torch.randn(6, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        distance = z.pow(2).sum(1, keepdim=True) - 2 * z @ self.codebook.t()
        distance = distance + self.codebook.pow(2).sum(1)
        one_hot = functional.one_hot(distance.argmin(1), 6).type(z.dtype)
        quantised = z + (one_hot @ self.codebook - z).detach()
        return {"reconstruction": self.decoder(quantised), "code": one_hot}


def codebook() -> nn.Module:
    return seeded(_Codebook)


LAYOUTS = (
    Layout(autoencoder, 4, shape=24),
    Layout(
        vae_that_draws,
        3,
        shape="1,4,4",
        refusal="random",
        remedy=Layout(vae, 3, shape="1,4,4"),
    ),
    Layout(
        generator,
        2,
        samples=lambda rng: {"z": normal(rng, 16, 5), "label": rng.integers(4, size=16)},
    ),
    Layout(
        discriminator_squeezed,
        2,
        shape="1,8,8",
        refusal="squeeze",
        remedy=Layout(discriminator, 2, shape="1,8,8"),
    ),
    Layout(
        discriminator_of_len,
        2,
        shape="1,8,8",
        refusal="take sizes from x.shape[0], not from len(x)",
        remedy=Layout(discriminator, 2, shape="1,8,8"),
    ),
    Layout(diffusion_step, 2, samples=_steps),
    Layout(codebook, 2, shape=8),
)
