"""Do drawn digits carry the digit asked for? A support vector machine that was trained on the real ones reads them.

The measure of the demo. What must not break: the reader is judged on real digits that it has not seen, and is not believed below
97 % there.
"""

from collections.abc import Callable

import numpy as np

LOWEST_READER_ACCURACY = 0.97
HELD_OUT = 0.25
SPLIT_SEED = 0
GAMMA = 0.001  # of the rbf kernel on pixels 0..16, scikit-learn's own example on these digits


def train_reader() -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Return (reader of uint8 [N, 8, 8] -> int64 [N], its accuracy on held-out real digits)."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC
    except ImportError:
        raise ValueError("metric digits needs scikit-learn; install it with: pip install scikit-learn") from None
    digits = load_digits()
    pixels = digits.images.reshape(-1, 64)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, digits.target, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=digits.target
    )
    machine = SVC(gamma=GAMMA).fit(train_x, train_y)

    def read(images: np.ndarray) -> np.ndarray:
        return machine.predict(images.reshape(-1, 64).astype(np.float64) * (16 / 255))

    accuracy = float((machine.predict(test_x) == test_y).mean())
    assert accuracy >= LOWEST_READER_ACCURACY, f"the reader knows only {accuracy:.1%} of held-out real digits"
    return read, accuracy


def agreement(read: Callable, images: np.ndarray, wanted: np.ndarray) -> dict:
    """Return the share of uint8 [N, 1, 8, 8] images that are read as `wanted`, in all and per digit."""
    hits = read(images[:, 0]) == wanted
    per_digit = {str(d): float(hits[wanted == d].mean()) for d in np.unique(wanted)}
    return {"share": float(hits.mean()), "images": len(wanted), "per_digit": per_digit}
