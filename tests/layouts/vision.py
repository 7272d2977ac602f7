"""Image classifiers of convolutions: KANs as kernels, in blocks and as heads."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KAN, KANConv2d, KANLinear, KernelsConv2d
from tests.layouts.layout import Layout, seeded


class _KernelsNet(nn.Module):
    """KAN convolutions, a KANLinear for each kernel (AntonioTepsich/Convolutional-KANs)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = KernelsConv2d(1, 3), KernelsConv2d(3, 2)
        self.pool1, self.flat = nn.MaxPool2d(2), nn.Flatten()
        self.kan1 = KANLinear(2 * 3 * 3, 4, grid_range=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv1(x))
        return functional.log_softmax(self.kan1(self.flat(self.conv2(x))), dim=1)


def kernels_net() -> nn.Module:
    return seeded(_KernelsNet)


class _LayerNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_kan() -> nn.Module:
    """Unfolded KAN convolutions with LayerNorm2D (StarostinV/convkan)."""
    return seeded(
        lambda: nn.Sequential(
            KANConv2d(1, 6, padding=1),
            _LayerNorm2d(6),
            KANConv2d(6, 6, padding=1, stride=2),
            _LayerNorm2d(6),
            KANConv2d(6, 5, padding=1, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )


class _GroupedKANConv(nn.Module):
    """KAN convolution with groups, GELU, LayerNorm and PReLU; a grid that is a plain tensor.

    Follows IvanDrokin/torch-conv-kan.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.base_activation = nn.GELU()
        self.base_conv = nn.ModuleList(nn.Conv2d(2, 3, 3, padding=1, bias=False) for _ in range(2))
        self.spline_conv = nn.ModuleList(
            nn.Conv2d(2 * 8, 3, 3, padding=1, bias=False) for _ in range(2)
        )
        self.layer_norm = nn.ModuleList(nn.InstanceNorm2d(3) for _ in range(2))
        self.prelus = nn.ModuleList(nn.PReLU() for _ in range(2))
        self.grid = torch.linspace(-2.2, 2.2, 12)
        self.head = KANLinear(6, 4, base_activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.one(part, i) for i, part in enumerate(torch.split(x, 2, dim=1))]
        return self.head(torch.cat(parts, dim=1).mean((-2, -1)))

    def one(self, x: Tensor, group: int) -> Tensor:
        base = self.base_conv[group](self.base_activation(x))
        at = x.unsqueeze(-1)
        grid = self.grid.to(x.device)
        bases = ((at >= grid[:-1]) & (at < grid[1:])).to(x.dtype)
        for k in range(1, 4):
            left = grid[: -(k + 1)]
            right = grid[k + 1 :]
            bases = (at - left) / (grid[k:-1] - left) * bases[..., :-1] + (right - at) / (
                right - grid[1:-k]
            ) * bases[..., 1:]
        bases = bases.moveaxis(-1, 2).flatten(1, 2)
        return self.prelus[group](self.layer_norm[group](base + self.spline_conv[group](bases)))


def grouped_kan_conv() -> nn.Module:
    return seeded(_GroupedKANConv)


class _ConvNeXt(nn.Module):
    """ConvNeXt blocks with layer scale and GELU, KANLinear for the head (ConvNeXt-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 4, stride=4), _LayerNorm2d(8)
        self.dwconv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.pwconv1, self.pwconv2 = KANLinear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.1))
        self.head = KANLinear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


def convnext() -> nn.Module:
    return seeded(_ConvNeXt)


class _BasicBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += identity
        return self.relu(x)


class _ResNet(nn.Module):
    """ResNet with a KAN for its `fc` (the head of ResNet-KAN fine-tuning projects)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = _BasicBlock(8, 8, 1), _BasicBlock(8, 12, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc: nn.Module = nn.Linear(12, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


def resnet() -> nn.Module:
    def make() -> nn.Module:
        network = _ResNet()
        network.fc = KAN([12, 6, 3])
        return network

    return seeded(make)


class _DenseNet(nn.Module):
    """Dense blocks that concatenate a list of maps, KANLinear transition (KAN-DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.transition, self.classifier = KANLinear(18, 8), KANLinear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(functional.relu(norm(torch.cat(features, 1)))))
        x = self.transition(torch.cat(features, 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pooled = functional.adaptive_avg_pool2d(functional.relu(x), (2, 2))
        return self.classifier(functional.dropout(pooled.amax((2, 3)), 0.2, self.training))


def densenet() -> nn.Module:
    return seeded(_DenseNet)


def vgg_layers(plan: Sequence[int | str]) -> nn.Sequential:
    """Make the features of a VGG from its plan."""
    layers: list[nn.Module] = []
    into = 3
    for step in plan:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(into, step, 3, padding=1), nn.BatchNorm2d(step), nn.ReLU(True)]
            into = step
    return nn.Sequential(*layers)


class _VGG(nn.Module):
    """VGG from a plan with an `M` for each pooling, KANLinear classifier (VGG16-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg_layers([4, "M", 6, 6, "M"])
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            KANLinear(54, 10), nn.Dropout(), KANLinear(10, 6), nn.Dropout(), KANLinear(6, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.view(x.size(0), -1))


def vgg() -> nn.Module:
    return seeded(_VGG)


class _EfficientNet(nn.Module):
    """Inverted bottleneck with hardswish and squeeze-and-excitation, in which KANs stand for fc.

    Follows MobileNetV3- and EfficientNet-KAN classifiers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12, eps=1e-3)
        self.depthwise = nn.Conv2d(12, 12, 5, 2, 2, groups=12, bias=False)
        self.bn2, self.act = nn.BatchNorm2d(12, momentum=0.01), nn.Hardswish()
        self.squeeze, self.excite = KANLinear(12, 4), KANLinear(4, 12)
        self.gate = nn.Hardsigmoid()
        self.project, self.head = nn.Conv2d(12, 6, 1), KANLinear(6, 3, base_activation=nn.Hardswish)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn2(self.depthwise(self.act(self.bn1(self.expand(x))))))
        scale = self.excite(self.squeeze(x.mean((2, 3))))
        x = x * self.gate(scale).unsqueeze(-1).unsqueeze(-1)
        return self.head(self.project(x).mean((2, 3)))


def efficientnet() -> nn.Module:
    return seeded(_EfficientNet)


class _CBAM(nn.Module):
    """Channel and spatial attention after a convolution, the channels' through one KAN.

    Follows the CBAM-KAN and SKNet-KAN heads of remote-sensing classifiers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.kan = KAN([8, 4, 8])
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False)
        self.classify = KANLinear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.conv(x))
        pooled = (functional.adaptive_avg_pool2d(x, 1), functional.adaptive_max_pool2d(x, 1))
        weight = sum((self.kan(y.flatten(1)) for y in pooled), torch.zeros(1))
        x = x * weight.sigmoid()[..., None, None]
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], dim=1)
        return self.classify((x * self.spatial(both).sigmoid()).mean((2, 3)))


def cbam() -> nn.Module:
    return seeded(_CBAM)


class _Uint8Images(nn.Module):
    """Raw pixels, normalised inside with buffers (deployed classifiers)."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=2), KAN([4, 6, 2])

    def forward(self, image: Tensor) -> Tensor:
        x = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.head(self.conv(x).amax((2, 3)).tanh()).softmax(-1)


def uint8_images() -> nn.Module:
    return seeded(_Uint8Images)


LAYOUTS = (
    Layout(kernels_net, 3 + 6 + 1, shape="1,12,12"),
    Layout(conv_kan, 3, shape="1,8,8"),
    Layout(grouped_kan_conv, 1, shape="4,6,6"),
    Layout(convnext, 2, shape="3,16,16"),
    Layout(resnet, 2, shape="3,24,24"),
    Layout(densenet, 2, shape="3,9,9"),
    Layout(vgg, 3, shape="3,12,12"),
    Layout(efficientnet, 3, shape="3,10,10"),
    Layout(cbam, 3, shape="3,8,8"),
    Layout(
        uint8_images,
        2,
        samples=lambda rng: {"image": rng.integers(256, size=(16, 9, 9, 3), dtype=np.uint8)},
    ),
)
