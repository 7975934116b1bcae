"""What is measured over a dataset while it is made: samples, classes, and each channel's mean and standard deviation.

Sums are kept per shard and merged in shard order, so that the manifest is the same however the work was shared.
"""

import numpy as np

from data_pipeline import manifest
from data_pipeline.index import NO_LABEL
from data_pipeline.manifest import Manifest
from data_pipeline.npy import Layout


def moments_of(codec: str, channels: int) -> str:
    """Tell what a codec's stored channels are: the SD-VAE's latents have 4, so 8 are means and standard deviations."""
    return "mean_std" if codec == "sd-vae-ft-mse" and channels == 8 else "mean"


class Statistics:
    """Sums over samples: per stored channel of x and x^2 (float64), and the classes."""

    def __init__(self):
        self.values = 0
        self.sums = np.zeros(0)
        self.squares = np.zeros(0)
        self.classes: dict[int, int] = {}

    def add(self, array: np.ndarray, label: int):
        """Count one stored sample [C, H, W]."""
        flat = array.reshape(len(array), -1).astype(np.float64)
        self._add(flat.shape[1], flat.sum(axis=1), np.einsum("ij,ij->i", flat, flat))
        self.classes[label] = self.classes.get(label, 0) + 1

    def _add(self, values, sums, squares):
        if not self.values:
            self.sums, self.squares = np.zeros(len(sums)), np.zeros(len(sums))
        self.values += values
        self.sums = self.sums + sums
        self.squares = self.squares + squares

    def merge(self, other: "Statistics"):
        """Add another shard's sums."""
        self._add(other.values, other.sums, other.squares)
        for label, count in other.classes.items():
            self.classes[label] = self.classes.get(label, 0) + count

    def to_json(self) -> dict:
        """Return what a restarted job needs."""
        classes = [[label, count] for label, count in sorted(self.classes.items())]
        return {"values": self.values, "sums": list(self.sums), "squares": list(self.squares), "classes": classes}

    @classmethod
    def from_json(cls, content: dict) -> "Statistics":
        """Invert `to_json`."""
        made = cls()
        made.values, made.classes = content["values"], dict(content["classes"])
        made.sums, made.squares = np.array(content["sums"]), np.array(content["squares"])
        return made

    def whitening(self, codec: str, moments: str) -> tuple[tuple, tuple, str]:
        """Return mean, std (per latent channel) and where they come from.

        Published constants where a paper's results rest on them; else the spread of the latents that training draws, which with
        stored posteriors is var(mean) + E[std^2].
        """
        if codec == "sd-vae-ft-mse":
            return manifest.SD_VAE_MEAN, manifest.SD_VAE_STD, "published"
        if codec == "pixels" and len(self.sums) == 3:
            return manifest.RGB_MEAN, manifest.RGB_STD, "published"
        mean = self.sums / self.values
        variance = self.squares / self.values - mean**2
        if moments == "mean_std":
            half = len(mean) // 2
            variance = variance[:half] + self.squares[half:] / self.values
            mean = mean[:half]
        std = np.sqrt(np.maximum(variance, 0.0))
        std[std == 0] = 1.0  # a channel that never varies
        return tuple(mean.tolist()), tuple(std.tolist()), "measured"

    def manifest(self, *, codec, codec_hash, layout: Layout, shards, container, label_dim=None, **more) -> Manifest:
        """Assemble the manifest of a dataset that these sums describe."""
        labels = [label for label in self.classes if label != NO_LABEL]
        unlabelled = self.classes.get(NO_LABEL, 0)
        if labels and unlabelled:
            raise ValueError(f"{unlabelled} samples have no label and the others do; label all of them or none")
        label_dim = max(labels, default=-1) + 1 if label_dim is None else label_dim
        if labels and max(labels) >= label_dim:
            raise ValueError(f"label {max(labels)} does not fit label_dim {label_dim}; labels are 0 .. label_dim - 1")
        if not labels:
            label_dim = 0
        moments = moments_of(codec, layout.shape[0])
        mean, std, whitening = self.whitening(codec, moments)
        counts = tuple(self.classes.get(label, 0) for label in range(label_dim))
        return Manifest(
            container=container,
            codec=codec,
            codec_hash=codec_hash,
            moments=moments,
            dtype=layout.dtype,
            shape=tuple(layout.shape),
            label_dim=label_dim,
            class_counts=counts,
            mean=mean,
            std=std,
            whitening=whitening,
            shards=tuple(shards),
            **more,
        )
