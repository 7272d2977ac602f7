"""scikit-learn's handwritten digits: 1,797 scanned images of 8 x 8 pixels, 16 shades of grey."""

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SHARE = 0.25
SEED = 0


def load_split() -> tuple[
    NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]
]:
    """Load the images, scaled to [-1, 1] where a KAN's grid lies.

    Returns:
        Training images (1347, 64), test images (450, 64), training labels, test labels. The split
        is always the same.
    """
    digits = load_digits()
    images = (digits.data / 8.0 - 1.0).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=TEST_SHARE, random_state=SEED, stratify=digits.target
    )
    return train_x, test_x, train_y, test_y
