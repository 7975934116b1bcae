"""What networks of magnitude-preserving blocks share: noise level and class go in, blocks run, magnitudes are noted.

EDM2's U-Net and the U-Node built of its blocks are such networks. What a maintainer must not break: the embedding runs in fp32
whatever the type of the image, and names of parameters are NVIDIA's, flat.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.magnitude import MPConv, MPFourier, mp_silu, mp_sum, rms


def magnitude(h: Tensor) -> Tensor:
    """Return M = mean over samples of sqrt(mean_j h_j^2), j over all elements of a sample, as a detached 0-d tensor.

    Fig. 3 and 15 of the paper plot it per layer, before the nonlinearity and after the gain.
    """
    return rms(h.detach(), tuple(range(1, h.ndim))).mean()


def label_rows(labels: Tensor | None, label_dim: int, like: Tensor) -> Tensor:
    """Return fp32 rows [N or 1, label_dim]: one-hot for classes; zeros for -1 and for no labels at all."""
    if labels is None:
        return torch.zeros(1, label_dim, device=like.device)
    if labels.is_floating_point():
        return labels.float().reshape(-1, label_dim)
    return (labels[:, None] == torch.arange(label_dim, device=labels.device)).float()


class Network(nn.Module):
    """What the networks of EDM2 blocks share: embedding of noise level and class, input, output, and how a block is run.

    A base, not a part, because NVIDIA's names are flat. A network of it says in `wire` how its blocks are connected, and has
    `num_levels`, `activation_checkpointing`, `out_conv` and `out_gain`.
    """

    def make_embedding(self, noise_channels: int, emb_channels: int, label_dim: int, label_balance: float) -> None:
        self.label_dim, self.label_balance = label_dim, label_balance
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None

    def embed(self, c_noise: Tensor, labels: Tensor | None, see) -> Tensor:
        """Return the fp32 embedding [N or 1, emb_channels]; `see(name, h)` takes note of magnitudes."""
        emb = see("emb_noise", self.emb_noise(self.emb_fourier(c_noise)))
        if self.emb_label is not None:
            rows = label_rows(labels, self.label_dim, c_noise)
            emb = mp_sum(emb, see("emb_label", self.emb_label(rows * math.sqrt(self.label_dim))), self.label_balance)
        return mp_silu(emb)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, dropout_mask=None, collect: bool = False
    ) -> tuple[Tensor, dict]:
        """Return F [N, C, H, W] in the type of `x`, and the magnitudes when `collect`.

        `labels` are int64 [N] (-1 = none), rows [N, label_dim], or None; `c_noise` [N] (or [1]) fp32. The embedding
        network runs in fp32. H and W need not be the nominal resolution, but must be divisible by 2^(levels - 1).
        """
        if x.shape[2] % (1 << self.num_levels - 1) or x.shape[3] % (1 << self.num_levels - 1):
            raise ValueError(
                f"input of {x.shape[2]}x{x.shape[3]} pixels: {self.num_levels} levels need multiples of "
                f"{1 << self.num_levels - 1}; pad or crop it"
            )
        seen: dict[str, Tensor] = {}

        def see(name: str, h: Tensor) -> Tensor:
            if collect:
                seen[name] = magnitude(h)
            return h

        emb = self.embed(c_noise, labels, see)

        def run(name: str, block: nn.Module, h: Tensor, *skip: Tensor) -> Tensor:
            inputs = (h, emb, dropout_mask, collect, *skip)
            if self.activation_checkpointing and self.training:
                h, part = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                h, part = block(*inputs)
            seen.update({f"{name}.{key}": value for key, value in part.items()})
            return h

        x = self.wire(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), see, run)
        return see("out_conv", self.out_conv(x, gain=self.out_gain)), seen
