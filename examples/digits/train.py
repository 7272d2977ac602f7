"""Train on the digits and save a state dict: `python -m examples.digits.train`.

Either a KAN, or, with `--network conv`, convolutions with a KAN for their head.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from examples.digits.data import load_split
from kan_model import KAN, KANLinear

EPOCHS = 40
BATCH = 64
NOISE = 0.25  # standard deviation added to the training images, whose values span 2


def kan() -> nn.Module:
    """Build a KAN; takes images as rows of pixels, (batch, 64)."""
    return KAN([64, 64, 10], grid_size=5, spline_order=3)


def conv_kan() -> nn.Module:
    """Build convolutions with a KAN for their head; takes images, (batch, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.Tanh(),  # into the range of the KAN's grid
        nn.MaxPool2d(2),
        nn.Flatten(),
        KANLinear(128, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "kan": (kan, (64,)),
    "conv": (conv_kan, (1, 8, 8)),
}
"""By name: what builds it, and the shape of one image."""


def train(name: str = "kan", seed: int = 0) -> tuple[nn.Module, float]:
    """Train, and tell on stderr how it goes.

    Args:
        name: One of `NETWORKS`.
        seed: Of the initial weights and the order of the images.

    Returns:
        The network in evaluation mode and its accuracy on the test images, from 0 to 1.
    """
    torch.manual_seed(seed)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, load_split())
    build, shape = NETWORKS[name]
    train_x, test_x = train_x.reshape(-1, *shape), test_x.reshape(-1, *shape)
    network = build()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=0.93)
    accuracy = 0.0
    for epoch in range(1, EPOCHS + 1):
        network.train()
        losses = []
        for rows in torch.randperm(len(train_x)).split(BATCH):
            optimiser.zero_grad()
            noisy = train_x[rows] + NOISE * torch.randn(len(rows), *shape)
            loss = nn.functional.cross_entropy(network(noisy), train_y[rows])
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        schedule.step()
        network.eval()
        with torch.no_grad():
            accuracy = float((network(test_x).argmax(1) == test_y).float().mean())
        if epoch == 1 or epoch % 10 == 0:
            print(
                f"  epoch {epoch:2d}: loss {fmean(losses):.4f}, test accuracy {accuracy:.2%}",
                file=sys.stderr,
            )
    return network, accuracy


def main() -> int:
    """Train and save; exit code 0."""
    parser = argparse.ArgumentParser(description="Train on handwritten digits.")
    parser.add_argument("--output", type=Path, default=Path("digits.pt"), metavar="FILE")
    parser.add_argument("--network", choices=NETWORKS, default="kan")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # batches are too small for two, which wait for each other
    started = time.perf_counter()
    network, accuracy = train(arguments.network)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), arguments.output)
    print(
        f"{arguments.output}: test accuracy {accuracy:.2%}, trained in "
        f"{time.perf_counter() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
