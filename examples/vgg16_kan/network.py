"""The network: `--model examples.vgg16_kan.network:vgg16_kan --input-shape 3,224,224`.

Built on the meta device, without values: at this size it matters that the weights exist once. The
export takes them from the checkpoint as they are.
"""

import math

import torch
from torch import nn

from kan_model import KANLinear

# Convolutions by their output channels, and "M" for max pooling: configuration D of
# https://arxiv.org/abs/1409.1556, table 1.
_FEATURES = (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M")
_HIDDEN = 2048
_IMAGE = 224


def vgg16_kan(classes: int = 2) -> nn.Module:
    """Build the network without values.

    Args:
        classes: Width of the output.

    Returns:
        Takes images (batch, 3, 224, 224), gives scores (batch, classes).
    """
    with torch.device("meta"):
        layers: list[nn.Module] = []
        channels = 3
        for width in _FEATURES:
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        side = _IMAGE // 2 ** _FEATURES.count("M")
        return nn.Sequential(
            nn.Sequential(*layers),
            nn.Flatten(),
            KANLinear(channels * side * side, _HIDDEN),
            nn.ReLU(),
            nn.Dropout(),
            KANLinear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Dropout(),
            KANLinear(_HIDDEN, classes),
        )


def draw_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network without values random ones, as large as trained ones are.

    Nobody has published a trained VGG16-KAN; what an export costs does not depend on the values.

    Args:
        network: As built. It is changed.
        seed: Of the values.

    Returns:
        The network, on the CPU, in evaluation mode.
    """
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * 9
                module.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
                assert module.bias is not None
                module.bias.zero_()
            elif isinstance(module, KANLinear):
                knots = KANLinear(1, 1).grid
                module.grid.copy_(knots.expand_as(module.grid))
                size = 1 / math.sqrt(module.in_features)
                module.base_weight.normal_(0, size, generator=generator)
                module.spline_weight.normal_(0, size, generator=generator)
                module.spline_scaler.uniform_(0.5, 1.5, generator=generator)
    return network.eval()
