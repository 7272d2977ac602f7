"""Write a checkpoint of VGG16-KAN: `python -m examples.vgg16_kan.checkpoint --output FILE`."""

import argparse
import sys
from pathlib import Path

import torch

from examples.vgg16_kan.network import draw_weights, vgg16_kan


def main() -> int:
    """Draw the weights and save them; exit code 0."""
    parser = argparse.ArgumentParser(description="Write a VGG16-KAN with random weights (2.3 GB).")
    parser.add_argument("--output", type=Path, default=Path("vgg16_kan.pt"), metavar="FILE")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    network = draw_weights(vgg16_kan())
    torch.save(network.state_dict(), arguments.output)
    parameters = sum(tensor.numel() for tensor in network.parameters())
    print(
        f"{arguments.output}: {parameters:,} parameters, {arguments.output.stat().st_size:,} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
