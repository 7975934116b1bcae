"""Streaming moments of features, and distances between two sets of images (Heusel et al. 2017; Kynkaanniemi et al. 2019).

Everything is float64 numpy. What must not break: statistics carry the identity of what they describe, and two kinds of features are
never compared.
"""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np

from data_pipeline.durable import write_atomically


class Statistics:
    """Count, sum and sum of outer products of features [N, D]; mergeable, so ranks and runs that go on add up exactly."""

    def __init__(self, features: str, dim: int):
        self.features, self.num = features, 0
        self.total, self.outer = np.zeros(dim), np.zeros((dim, dim))

    def add(self, rows: np.ndarray) -> None:
        """Take in features [N, D]; raise ValueError for values that are not finite."""
        rows = np.asarray(rows, np.float64)
        if not np.isfinite(rows).all():
            raise ValueError(
                f"features {self.features}: not finite for some images; the network or its input is broken"
            )
        self.num += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def merge(self, other: "Statistics") -> None:
        """Take in another part of the same set."""
        assert self.features == other.features
        self.num, self.total, self.outer = self.num + other.num, self.total + other.total, self.outer + other.outer

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean [D] and covariance [D, D] with n - 1."""
        if self.num < 2:
            raise ValueError(f"{self.num} images: a covariance needs at least two; draw more")
        mean = self.total / self.num
        return mean, (self.outer - self.num * np.outer(mean, mean)) / (self.num - 1)


def distance(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """Return |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), with the root taken of the symmetric A^(1/2) B A^(1/2)."""
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(0))
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ covariance_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def save(path: Path, mean: np.ndarray, covariance: np.ndarray, identity: dict, rows: np.ndarray) -> None:
    """Write moments as .npz, with the identity of what they describe and some of the features, fp32 [N, D]."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mean, sigma=covariance, identity=np.array(json.dumps(identity)), rows=rows.astype(np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load(path: str | os.PathLike, kind: str) -> tuple[np.ndarray, np.ndarray, dict, np.ndarray | None]:
    """Read (mean, covariance, identity, features or None) from .npz (ours, or {mu, sigma}) or a published dataset-refs pickle.

    `kind` names the entry of a pickle: {num_images, fid: {mu, sigma}, fd_dinov2: {...}}. Nothing in a pickle is executed.
    """
    path, rows = Path(path), None
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as found:
                identity = json.loads(str(found["identity"])) if "identity" in found else {"file": path.name}
                rows = found.get("rows")
                moments = found["mu"], found["sigma"]
        else:
            with open(path, "rb") as file:
                found = _OnlyArrays(file).load()
            identity = {"file": path.name, "num_images": int(found.get("num_images", 0))}
            moments = found[kind]["mu"], found[kind]["sigma"]
        mean, covariance = (np.asarray(m, np.float64) for m in moments)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of reference statistics") from None
    except (KeyError, TypeError, AttributeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: holds no statistics of {kind} ({error}); expected mu and sigma") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not belong together")
    return mean, covariance, identity, rows


_ALLOWED = {
    *(("numpy.core.multiarray", n) for n in ("_reconstruct", "scalar")),
    *(("numpy._core.multiarray", n) for n in ("_reconstruct", "scalar")),
    *(("numpy", n) for n in ("ndarray", "dtype")),
}


class _OnlyArrays(pickle.Unpickler):
    """Unpickle dicts, numbers and numpy arrays, and nothing that could run."""

    def find_class(self, module, name):
        if (module, name) == ("dnnlib.util", "EasyDict"):
            return dict
        if (module, name) in _ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"refused: {module}.{name}")


def precision_recall(real: np.ndarray, drawn: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Return the shares of drawn features inside the real manifold, and of real ones inside the drawn (Kynkaanniemi et al. 2019).

    A manifold is the union of balls around its points [N, D], each reaching its k-th nearest neighbour (k = 3 in the paper).
    """
    if min(len(real), len(drawn)) <= neighbours:
        raise ValueError(
            f"{min(len(real), len(drawn))} images: precision and recall need more than {neighbours}; draw more"
        )

    def squared(a, b):
        return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clip(0)

    def inside(points, manifold):
        own = squared(manifold, manifold)
        np.fill_diagonal(own, 0)
        radii = np.partition(own, neighbours, axis=1)[:, neighbours]
        return float((squared(points, manifold) <= radii).any(1).mean())

    real, drawn = np.asarray(real, np.float64), np.asarray(drawn, np.float64)
    return inside(drawn, real), inside(real, drawn)
