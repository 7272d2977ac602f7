"""Time series: windows in, horizons, quantiles and states out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Arrays, Layout, floats, normal, seeded

_WINDOW, _HORIZON, _CHANNELS = 16, 4, 3


class _RevIN(nn.Module):
    """Normalise by a window's own statistics, kept as attributes between the two calls."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.affine_weight = nn.Parameter(torch.ones(features))
        self.affine_bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, mode: str) -> Tensor:
        if mode == "norm":
            self.mean = x.mean(1, keepdim=True).detach()
            self.stdev = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5).detach()
            return (x - self.mean) / self.stdev * self.affine_weight + self.affine_bias
        if mode == "denorm":
            x = (x - self.affine_bias) / (self.affine_weight + 1e-10)
            return x * self.stdev + self.mean
        raise NotImplementedError(mode)


class _RMoK(nn.Module):
    """Reversible mixture of KAN experts over variables (2448845600/KAN4TSF)."""

    def __init__(self) -> None:
        super().__init__()
        self.rev = _RevIN(_CHANNELS)
        self.gate = nn.Linear(_WINDOW, 3)
        self.experts = nn.ModuleList(KANLinear(_WINDOW, _HORIZON, grid_size=g) for g in (3, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, channels = x.shape
        x = self.rev(x, "norm").transpose(1, 2).reshape(batch * channels, -1)
        score = functional.softmax(self.gate(x), dim=-1)
        outs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        y = torch.einsum("BLE,BE->BL", outs, score).reshape(batch, channels, -1).permute(0, 2, 1)
        return self.rev(y, "denorm")


def rmok() -> nn.Module:
    return seeded(_RMoK)


class _Decomposition(nn.Module):
    """Moving average by padding with the ends, a KAN for trend and one for season (DLinear-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.AvgPool1d(5, stride=1)
        self.season, self.trend = KANLinear(_WINDOW, _HORIZON), KAN([_WINDOW, 6, _HORIZON])

    def forward(self, x: Tensor) -> Tensor:
        front, end = x[:, 0:1, :].repeat(1, 2, 1), x[:, -1:, :].repeat(1, 2, 1)
        trend = self.average(torch.cat([front, x, end], dim=1).permute(0, 2, 1))
        season = x.permute(0, 2, 1) - trend
        return (self.season(season) + self.trend(trend)).permute(0, 2, 1)


def decomposition() -> nn.Module:
    return seeded(_Decomposition)


class _LSTMForecaster(nn.Module):
    """Zero states made in forward, the last step through a KAN (LSTM-KAN, TKAN comparisons)."""

    def __init__(self, cell: str = "LSTM") -> None:
        super().__init__()
        kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}[cell]
        self.cell, self.layers, self.hidden = cell, 2, 6
        self.rnn = kind(_CHANNELS, 6, 2, batch_first=True, bidirectional=cell == "GRU")
        self.kan = KAN([6 if cell == "LSTM" else 12, 5, _HORIZON])

    def forward(self, x: Tensor) -> Tensor:
        if self.cell == "LSTM":
            h0 = torch.zeros(self.layers, x.size(0), self.hidden).to(x.device).requires_grad_()
            c0 = torch.zeros(self.layers, x.size(0), self.hidden).to(x.device).requires_grad_()
            out, _ = self.rnn(x, (h0.detach(), c0.detach()))
        else:
            self.rnn.flatten_parameters()
            out, _ = self.rnn(x)
        return self.kan(out[:, -1, :])


def lstm_forecaster() -> nn.Module:
    return seeded(_LSTMForecaster)


def gru_forecaster() -> nn.Module:
    """A bidirectional GRU with a KAN head (CNN-GRU-KAN projects)."""
    return seeded(lambda: _LSTMForecaster("GRU"))


class _Streaming(nn.Module):
    """An LSTM that takes its states and returns them, batch second as torch has it."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.lstm, self.head = nn.LSTM(_CHANNELS, 5, 2, batch_first=True), KANLinear(5, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.batch_first:
            h, c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        out, (h, c) = self.lstm(x, (h, c))
        if self.batch_first:
            h, c = h.transpose(0, 1), c.transpose(0, 1)
        return self.head(out[:, -1]), h, c


def streaming_lstm() -> nn.Module:
    return seeded(lambda: _Streaming(batch_first=False))


def streaming_lstm_batch_first() -> nn.Module:
    return seeded(lambda: _Streaming(batch_first=True))


def _with_states(first: bool) -> Callable[[np.random.Generator], Arrays]:
    shape = (12, 2, 5) if first else (2, 12, 5)
    return lambda rng: {
        "x": normal(rng, 12, 6, _CHANNELS),
        "h": normal(rng, *shape),
        "c": normal(rng, *shape),
    }


class _KANCell(nn.Module):
    """A recurrent cell of KANLinears, unrolled in Python (remigenet/TKAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.inner = nn.Linear(_CHANNELS + 4, 12), KANLinear(_CHANNELS + 4, 4)
        self.out = KANLinear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        c = torch.zeros_like(h)
        for step in x.unbind(1):
            both = torch.cat([step, h], dim=-1)
            i, f, o = self.gates(both).sigmoid().chunk(3, dim=-1)
            c = f * c + i * torch.tanh(self.inner(both))
            h = o * torch.tanh(c)
        return self.out(h).squeeze(-1)


def kan_cell() -> nn.Module:
    return seeded(_KANCell)


class _Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class _TCN(nn.Module):
    """Weight-normed causal convolutions with a KAN head (laowu-code/iTransformer_LSTM_CA_KAN)."""

    def __init__(self, parametrized: bool) -> None:
        super().__init__()
        if parametrized:
            norm: Callable[..., nn.Module] = nn.utils.parametrizations.weight_norm
        else:
            norm = nn.utils.weight_norm
        self.blocks = nn.ModuleList(
            nn.Sequential(
                norm(nn.Conv1d(_CHANNELS if d == 1 else 6, 6, 3, padding=2 * d, dilation=d)),
                _Chomp(2 * d),
                nn.ReLU(),
                nn.Dropout(0.2),
            )
            for d in (1, 2)
        )
        self.kan = KANLinear(6, _HORIZON)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 1)
        for block in self.blocks:
            y = block(y) + (y if y.shape[1] == 6 else 0)
        return self.kan(y[:, :, -1])


def tcn() -> nn.Module:
    return seeded(lambda: _TCN(parametrized=True))


def tcn_old_weight_norm() -> nn.Module:
    """The same with torch.nn.utils.weight_norm, hooks of which set the weight before each call."""
    return seeded(lambda: _TCN(parametrized=False))


class _ITransformer(nn.Module):
    """Variables as tokens, attention between them, KAN for the feed-forward (iTransformer-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1 = nn.Linear(_WINDOW, 8), nn.LayerNorm(8)
        self.attend, self.norm2 = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.ffn, self.project = KAN([8, 16, 8]), KANLinear(8, _HORIZON)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(1, keepdim=True).detach()
        x = x - means
        stdev = torch.sqrt(torch.var(x, dim=1, keepdim=True, unbiased=False) + 1e-5)
        h = self.embed((x / stdev).permute(0, 2, 1))
        h = self.norm1(h + self.attend(h, h, h)[0])
        h = self.norm2(h + self.ffn(h))
        y = self.project(h).permute(0, 2, 1)[:, :, : x.shape[2]]
        return y * stdev[:, 0, :].unsqueeze(1).repeat(1, _HORIZON, 1) + means


def itransformer() -> nn.Module:
    return seeded(_ITransformer)


class _Frequencies(nn.Module):
    """Frequency bands by rfft and irfft, a KAN over each (huangst21/TimeKAN, KFS)."""

    def __init__(self) -> None:
        super().__init__()
        self.bands = nn.ModuleList(KANLinear(_WINDOW, _HORIZON) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x.transpose(1, 2), dim=-1)
        low = torch.zeros_like(spectrum)
        low[..., :3] = spectrum[..., :3]
        slow = torch.fft.irfft(low, n=_WINDOW, dim=-1)
        fast = torch.fft.irfft(spectrum - low, n=_WINDOW, dim=-1)
        return (self.bands[0](slow) + self.bands[1](fast)).transpose(1, 2)


def frequencies() -> nn.Module:
    return seeded(_Frequencies)


class _DFTFrequencies(nn.Module):
    """The same bands by products with cosines and sines, without complex numbers."""

    low: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bands = nn.ModuleList(KANLinear(_WINDOW, _HORIZON) for _ in range(2))
        spectrum = torch.fft.rfft(torch.eye(_WINDOW), dim=-1)
        spectrum[:, 3:] = 0
        self.register_buffer("low", torch.fft.irfft(spectrum, n=_WINDOW, dim=-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        slow = x @ self.low
        return (self.bands[0](slow) + self.bands[1](x - slow)).transpose(1, 2)


def frequencies_as_products() -> nn.Module:
    return seeded(_DFTFrequencies)


class _Periods(nn.Module):
    """The periods of a *batch*, by topk over its mean spectrum, in numpy (MSGNet-KAN, TimesNet)."""

    def __init__(self, own_periods: bool) -> None:
        super().__init__()
        self.own_periods = own_periods
        self.norm, self.kan = nn.LayerNorm(_CHANNELS), KANLinear(_CHANNELS, _CHANNELS)
        self.project = KANLinear(_WINDOW * _CHANNELS, _HORIZON)

    def periods(self, x: Tensor) -> Any:
        if self.own_periods:
            return (8, 4)
        spectrum = torch.fft.rfft(x, dim=1).abs().mean(0).mean(-1)
        spectrum[0] = 0
        _, top = torch.topk(spectrum, 2)
        return x.shape[1] // top.detach().cpu().numpy()

    def forward(self, x: Tensor) -> Tensor:
        batch, time, channels = x.shape
        outs = []
        for period in self.periods(x):
            length = -(-time // int(period)) * int(period)
            padded = functional.pad(x, (0, 0, 0, length - time))
            y = padded.reshape(batch, length // int(period), int(period), channels)
            y = self.kan(self.norm(y)) + y.mean(2, keepdim=True)
            outs.append(y.reshape(batch, -1, channels)[:, :time])
        return self.project(torch.stack(outs, dim=-1).mean(-1).reshape(batch, -1))


def periods() -> nn.Module:
    return seeded(lambda: _Periods(own_periods=False))


def fixed_periods() -> nn.Module:
    return seeded(lambda: _Periods(own_periods=True))


class _NBeats(nn.Module):
    """Blocks that subtract their backcast, of KANs; quantiles sorted by cumsum of softplus.

    Follows KAN forecasters in darts and neuralforecast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KAN([_WINDOW, 8, _WINDOW + _HORIZON]) for _ in range(2))
        self.quantiles = KANLinear(_HORIZON, _HORIZON * 3)

    def forward(self, insample_y: Tensor) -> Tensor:
        residual, forecast = insample_y, insample_y[:, -1:].expand(-1, _HORIZON)
        for block in self.blocks:
            backcast, out = block(residual).split([_WINDOW, _HORIZON], dim=-1)
            residual, forecast = residual - backcast, forecast + out
        raw = self.quantiles(forecast).view(-1, _HORIZON, 3)
        steps = torch.cat([raw[..., :1], functional.softplus(raw[..., 1:])], dim=-1)
        return forecast.unsqueeze(-1) + steps.cumsum(-1)


def nbeats_quantiles() -> nn.Module:
    return seeded(_NBeats)


_WINDOWS = floats(_WINDOW, _CHANNELS, rows=16)

LAYOUTS = (
    Layout(rmok, 3, samples=_WINDOWS),
    Layout(decomposition, 3, shape=(_WINDOW, _CHANNELS)),
    Layout(lstm_forecaster, 2, samples=_WINDOWS),
    Layout(gru_forecaster, 2, samples=_WINDOWS),
    Layout(
        streaming_lstm,
        1,
        samples=_with_states(first=False),
        refusal="may have the batch second",
        remedy=Layout(streaming_lstm_batch_first, 1, samples=_with_states(first=True)),
    ),
    Layout(kan_cell, 2, shape=(5, _CHANNELS)),
    Layout(tcn, 1, samples=_WINDOWS),
    Layout(tcn_old_weight_norm, 1, samples=_WINDOWS),
    Layout(itransformer, 3, samples=_WINDOWS),
    Layout(
        frequencies,
        2,
        samples=_WINDOWS,
        refusal="complex",
        remedy=Layout(frequencies_as_products, 2, samples=_WINDOWS),
    ),
    Layout(
        periods,
        2,
        samples=_WINDOWS,
        refusal="numpy",
        remedy=Layout(fixed_periods, 2, samples=_WINDOWS),
    ),
    Layout(nbeats_quantiles, 5, samples=lambda rng: {"insample_y": normal(rng, 16, _WINDOW)}),
)
