"""Image classifiers of patches: transformers, windows and mixers."""

import torch
from torch import Tensor, nn

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Layout, seeded


class _Block(nn.Module):
    """Pre-norm attention with fused qkv, then two KANLinears for the MLP; layer scale, DropPath."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(KANLinear(dim, 2 * dim), nn.Dropout(0.1), KANLinear(2 * dim, dim))
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(batch, count, dim))
        return x + self.gamma * self.mlp(self.norm2(x).reshape(-1, dim)).reshape(batch, count, dim)


class _ViT(nn.Module):
    """DeiT with KANs for its MLPs, class token (chenziwenhaoshuai/Vision-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 10, 8))
        self.blocks = nn.ModuleList(_Block(8, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vit() -> nn.Module:
    return seeded(_ViT)


class _SwinBlock(nn.Module):
    """Shifted windows with a relative bias and a mask, KAN feed-forward (Swam244/SwinKAN)."""

    relative: Tensor
    mask: Tensor

    def __init__(self, dim: int, window: int, shift: int, size: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = nn.Linear(dim, 3 * dim)
        self.bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2))
        self.ffn = KAN([dim, 2 * dim, dim])
        at = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None, :] + window - 1
        self.register_buffer("relative", offset[0] * (2 * window - 1) + offset[1])
        areas = torch.zeros(1, size, size, 1)
        cuts = (slice(0, -window), slice(-window, -shift or None), slice(-shift, None))
        for number, (rows, columns) in enumerate((a, b) for a in cuts for b in cuts):
            areas[:, rows, columns] = number
        area = self.windows(areas).squeeze(-1)
        different = area[:, None, :] != area[:, :, None]
        self.register_buffer(
            "mask", different.float() * (-100.0 if shift else 0.0), persistent=False
        )

    def windows(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        w = self.window
        x = x.view(batch, height // w, w, width // w, w, dim)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        w = self.window
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), dims=(1, 2))
        q, k, v = self.attend(self.windows(y)).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / dim**0.5 + self.bias_table[self.relative.view(-1)].view(
            w * w, w * w
        )
        count = self.mask.shape[0]
        scores = (scores.view(-1, count, w * w, w * w) + self.mask).view(-1, w * w, w * w)
        y = (scores.softmax(-1) @ v).view(batch, height // w, width // w, w, w, dim)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, dim)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), dims=(1, 2))
        x = x + y
        return x + self.ffn(self.norm2(x))


class _Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(_SwinBlock(8, 4, 0, 8), _SwinBlock(8, 4, 2, 8))
        self.merge, self.norm = nn.Linear(32, 8, bias=False), nn.LayerNorm(32)
        self.head = KANLinear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.head(self.merge(self.norm(torch.cat(corners, -1))).mean((1, 2)))


def swin() -> nn.Module:
    return seeded(_Swin)


class _MixerLayer(nn.Module):
    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens, self.channels = KAN([patches, 6, patches]), KAN([dim, 12, dim])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class _Mixer(nn.Module):
    """MLP-Mixer with KANs over tokens and over channels (engichang1467/KAN-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.layers = nn.ModuleList(_MixerLayer(9, 8) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, c, h, w = x.shape
        x = x.view(b, c, h * w).permute(0, 2, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))


def mixer() -> nn.Module:
    return seeded(_Mixer)


LAYOUTS = (
    Layout(vit, 4, shape="3,12,12"),
    Layout(swin, 5, shape="3,16,16"),
    Layout(mixer, 8, shape="3,12,12"),
)
