"""Sound and sensors: spectrograms made inside, convolutions over time, recurrent layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Layout, floats, seeded

_SAMPLES = 256


def _filters() -> Tensor:
    """Triangles over 17 bins, as a mel filter bank has them."""
    centres = torch.linspace(0, 16, 8)
    return (1 - (torch.arange(17)[:, None] - centres[1:-1]).abs() / 3).clamp(min=0)


class _Spectrogram(nn.Module):
    """torch.stft, power, mel filters, log, CNN, KAN head (audio classifiers with KAN)."""

    window: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.register_buffer("mel", _filters())
        self.conv, self.kan = nn.Conv2d(1, 4, 3, stride=2), KAN([4, 6, 3])

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = torch.stft(wave, 32, 16, window=self.window, return_complex=True)
        power = spectrum.abs().pow(2)
        mel = torch.log(torch.matmul(power.transpose(1, 2), self.mel) + 1e-6)
        h = functional.relu(self.conv(mel.unsqueeze(1)))
        return self.kan(h.mean((2, 3)))


def spectrogram() -> nn.Module:
    return seeded(_Spectrogram)


class _FramedSpectrogram(nn.Module):
    """The same front end by `unfold` and products with cosines and sines."""

    dft: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        spectrum = torch.fft.rfft(torch.eye(32) * torch.hann_window(32), dim=-1)
        self.register_buffer("dft", torch.stack([spectrum.real, spectrum.imag]).contiguous())
        self.register_buffer("mel", _filters())
        self.conv, self.kan = nn.Conv2d(1, 4, 3, stride=2), KAN([4, 6, 3])

    def forward(self, wave: Tensor) -> Tensor:
        wave = functional.pad(wave.unsqueeze(1), (16, 16), mode="reflect").squeeze(1)
        frames = wave.unfold(-1, 32, 16)
        power = (frames @ self.dft[0]).pow(2) + (frames @ self.dft[1]).pow(2)
        mel = torch.log(torch.matmul(power, self.mel) + 1e-6)
        h = functional.relu(self.conv(mel.unsqueeze(1)))
        return self.kan(h.mean((2, 3)))


def framed_spectrogram() -> nn.Module:
    return seeded(_FramedSpectrogram)


class _KeywordSpotter(nn.Module):
    """Strided 1-d convolutions on the wave, a GRU, attention pooling, KANs (CNN-GRU-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(1, 6, 9, stride=4), nn.BatchNorm1d(6), nn.ELU(), nn.Conv1d(6, 6, 5, stride=4)
        )
        self.gru, self.score = nn.GRU(6, 5, batch_first=True), KANLinear(5, 1)
        self.head = KANLinear(5, 4)

    def forward(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        h, _ = self.gru(self.front(wave.unsqueeze(1)).transpose(1, 2))
        weights = torch.softmax(self.score(h), dim=1)
        return self.head(torch.sum(weights * h, dim=1)), weights.squeeze(-1)


def keyword_spotter() -> nn.Module:
    return seeded(_KeywordSpotter)


class _Activity(nn.Module):
    """Sensors of a wrist: ConvLSTM over (time, channels), KAN head (KAN-HAR)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv1d(6, 8, 5, padding="same"), nn.MaxPool1d(2)
        self.lstm = nn.LSTM(8, 6)
        self.kan = nn.Sequential(nn.LayerNorm(6), KANLinear(6, 8, grid_size=8), KANLinear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(torch.relu(self.conv(x.transpose(1, 2)))).permute(2, 0, 1)
        _, (last, _) = self.lstm(h)
        return self.kan(last[-1])


def activity() -> nn.Module:
    return seeded(_Activity)


_WAVE: Any = lambda rng: {"wave": floats(_SAMPLES, rows=10)(rng)["x"]}  # noqa: E731

LAYOUTS = (
    Layout(spectrogram, 2, samples=_WAVE),
    Layout(framed_spectrogram, 2, samples=_WAVE),
    Layout(keyword_spotter, 2, samples=_WAVE),
    Layout(activity, 2, shape=(20, 6)),
)
