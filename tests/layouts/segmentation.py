"""Segmentation and restoration: images in, maps of the same or another size out."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KANConv2d, KANLinear
from tests.layouts.layout import Layout, floats, seeded


class _DepthwiseBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn, self.relu = nn.BatchNorm2d(dim), nn.ReLU()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, _, channels = x.shape
        x = x.transpose(1, 2).view(batch, channels, height, width)
        return self.relu(self.bn(self.dwconv(x))).flatten(2).transpose(1, 2)


class _KANBlock(nn.Module):
    """LayerNorm, then three times a KANLinear over tokens and a depthwise convolution; residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fcs = nn.ModuleList(KANLinear(dim, dim) for _ in range(3))
        self.convs = nn.ModuleList(_DepthwiseBlock(dim) for _ in range(3))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.norm(x)
        for fc, conv in zip(self.fcs, self.convs, strict=True):
            batch, tokens, channels = y.shape
            y = fc(y.reshape(batch * tokens, channels)).reshape(batch, tokens, channels)
            y = conv(y.contiguous(), height, width)
        return x + y


class _PatchEmbed(nn.Module):
    def __init__(self, into: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(into, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        _, _, height, width = x.shape
        return self.norm(x.flatten(2).transpose(1, 2)), height, width


class _Convs(nn.Sequential):
    def __init__(self, into: int, out: int, middle: int | None = None) -> None:
        middle = middle or out
        super().__init__(
            nn.Conv2d(into, middle, 3, padding=1),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )


def _as_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous()


def _doubled(x: Tensor) -> Tensor:
    return functional.relu(functional.interpolate(x, scale_factor=(2, 2), mode="bilinear"))


class UKAN(nn.Module):
    """A U-Net of which the two deepest stages are tokenised KAN blocks, 12 KANLinear layers.

    Follows CUHK-AIM-Group/U-KAN.
    """

    def __init__(self, dims: tuple[int, int, int], classes: int = 1) -> None:
        super().__init__()
        a, b, c = dims
        self.encoders = nn.ModuleList(
            [_Convs(3, a // 8), _Convs(a // 8, a // 4), _Convs(a // 4, a)]
        )
        self.embed3, self.embed4 = _PatchEmbed(a, b), _PatchEmbed(b, c)
        self.block1, self.block2 = _KANBlock(b), _KANBlock(c)
        self.dblock1, self.dblock2 = _KANBlock(b), _KANBlock(a)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in (b, c, b, a))
        self.decoder1, self.decoder2 = _Convs(c, b, c), _Convs(b, a, b)
        self.decoder3, self.decoder4 = _Convs(a, a // 4, a), _Convs(a // 4, a // 8, a // 4)
        self.decoder5 = _Convs(a // 8, a // 8)
        self.final = nn.Conv2d(a // 8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for encoder in self.encoders:
            x = functional.relu(functional.max_pool2d(encoder(x), 2, 2))
            skips.append(x)
        x, height, width = self.embed3(x)
        x = _as_map(self.norms[0](self.block1(x, height, width)), height, width)
        skips.append(x)
        x, height, width = self.embed4(x)
        x = _as_map(self.norms[1](self.block2(x, height, width)), height, width)

        x = _doubled(self.decoder1(x)) + skips[3]
        _, _, height, width = x.shape
        x = self.dblock1(x.flatten(2).transpose(1, 2), height, width)
        x = _doubled(self.decoder2(_as_map(self.norms[2](x), height, width))) + skips[2]
        _, _, height, width = x.shape
        x = self.dblock2(x.flatten(2).transpose(1, 2), height, width)
        x = _doubled(self.decoder3(_as_map(self.norms[3](x), height, width))) + skips[1]
        x = _doubled(self.decoder4(x)) + skips[0]
        return self.final(_doubled(self.decoder5(x)))


def ukan_small() -> nn.Module:
    """U-KAN at widths 32, 40 and 64, for images of (3, 64, 64): what exports are timed with."""
    return seeded(lambda: UKAN((32, 40, 64)))


def ukan_large() -> nn.Module:
    """U-KAN at its published widths 256, 320 and 512, for images of (3, 224, 224)."""
    return seeded(lambda: UKAN((256, 320, 512)))


def ukan_tiny() -> nn.Module:
    """U-KAN at widths 8, 8 and 8, which the catalogue exports."""
    return seeded(lambda: UKAN((8, 8, 8), classes=2))


class _PixelShuffle(nn.Module):
    """Super-resolution: a KAN bottleneck at every pixel, pixel shuffle, a bicubic skip.

    Follows the layout of ESPCN-like heads in KAN restoration projects (Vision-KAN, KanSSR).
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 5, padding=2, padding_mode="reflect")
        self.kan = KANLinear(8, 8)
        self.tail = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.head(x))
        y = y + self.kan(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        skip = functional.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        return self.tail(y) + skip


def pixel_shuffle() -> nn.Module:
    return seeded(_PixelShuffle)


class _DilatedPyramid(nn.Module):
    """Dilated convolutions in parallel, global pooling beside them, KANs over channels (ASPP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.GroupNorm(2, 6))
        self.branches = nn.ModuleList(nn.Conv2d(6, 4, 3, padding=d, dilation=d) for d in (1, 2, 3))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.ReLU())
        self.project, self.classify = KANLinear(16, 8), KANLinear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        y = nn.functional.leaky_relu(self.stem(x))
        maps = [branch(y) for branch in self.branches]
        maps.append(self.pooled(y).expand(-1, -1, *y.shape[-2:]))
        rows = torch.cat(maps, 1).movedim(1, -1)
        logits = self.classify(self.project(rows)).movedim(-1, 1)
        return functional.interpolate(logits, size=size, mode="nearest").softmax(1)


def dilated_pyramid() -> nn.Module:
    return seeded(_DilatedPyramid)


class _KANUNet(nn.Module):
    """A U-Net of KAN convolutions with a dilated bottleneck and InstanceNorm (torch-conv-kan)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = KANConv2d(1, 4, padding=1), KANConv2d(4, 4, padding=2, dilation=2)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, stride=2), KANConv2d(8, 1, size=1)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.act = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act(self.norm(self.down(x)))
        y = self.up(self.middle(functional.avg_pool2d(skip, 2)))
        height, width = (a - b for a, b in zip(skip.shape[2:], y.shape[2:], strict=True))
        if height or width:
            y = functional.pad(y, (0, width, 0, height))
        return self.out(torch.cat([skip, y], dim=1)).sigmoid()


def kan_unet() -> nn.Module:
    return seeded(_KANUNet)


LAYOUTS = (
    Layout(ukan_tiny, 12, shape="3,32,32"),
    Layout(pixel_shuffle, 1, shape=(3, 8, 8)),
    Layout(dilated_pyramid, 2, shape="image=3,12,12"),
    Layout(kan_unet, 3, samples=floats(1, 9, 9, rows=8)),
)
