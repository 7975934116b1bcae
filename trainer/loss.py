"""Denoising loss with EDM2's learned uncertainty (arXiv 2312.02696, Eq. 21; weight of arXiv 2206.00364, Table 1).

L = lambda(s) / e^u(s) |D(y + s n; s) - y|^2 + u(s), lambda = (s^2 + sd^2) / (s sd)^2, summed over the elements of a
sample, so that u counts C H W times. Other weightings lambda are those of the literature on variance-preserving diffusion;
the uncertainty divides each of them out, so they are for training without it. What a maintainer must not break: it is a sum
per sample, never a mean; the trainer divides once, by the global batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LossParts:
    """What the metrics want besides the loss: all detached, fp32.

    `unweighted` [N] is mean |D - y|^2 per element; `weighted` [N] is EDM's lambda times that, whatever the objective's weighting
    (1 where the network knows only the variance of the data); `logvar` [N]; `magnitudes` by layer where they were collected.
    """

    unweighted: Tensor
    weighted: Tensor
    logvar: Tensor
    magnitudes: dict[str, Tensor]
    sigma: Tensor  # [N]


def sample_weight(
    sigma: Tensor,
    sigma_data: float,
    weighting: str = "edm",
    prediction: str = "edm",
    gamma: float = 0.0,
    k: float = 1.0,
) -> Tensor:
    """Return lambda(sigma), the weight on |D - y|^2, of the shape of `sigma`.

    With SNR = (sd / sigma)^2 and x0 = y / sd of unit variance, the weights on |x0' - x0|^2 are: edm 1 + SNR; constant 1 on the
    predicted quantity, that is SNR (epsilon), 1 (x0), 1 + SNR (v and EDM's F); min_snr min(SNR, gamma), gamma 5 (Hang et al. 2023);
    soft_min_snr gamma SNR / (SNR + gamma), gamma 5 (4 in Crowson et al. 2024); p2 SNR / (k + SNR)^gamma, both 1 (Choi et al. 2022).
    """
    gamma = gamma or (1.0 if weighting == "p2" else 5.0)
    if weighting == "constant":
        weighting = {"epsilon": "snr", "x0": "one"}.get(prediction, "edm")
    if weighting == "edm":
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    snr = (sigma_data / sigma) ** 2
    weight = {
        "snr": lambda: snr,
        "one": lambda: torch.ones_like(snr),
        "min_snr": lambda: snr.clamp(max=gamma),
        "soft_min_snr": lambda: gamma * snr / (snr + gamma),
        "p2": lambda: snr / (k + snr) ** gamma,
    }[weighting]()
    return weight / sigma_data**2


def drop_labels(labels: Tensor | None, uniform: Tensor | None, probability: float) -> Tensor | None:
    """Replace by "no label" the samples whose `uniform` [N] is below `probability`, for classifier-free guidance.

    Integer labels become -1, rows [N, label_dim] become zeros: both are the unconditional input of the network.
    """
    if labels is None or probability <= 0:
        return labels
    if uniform is None:
        raise ValueError(f"loss.label_dropout {probability} needs a uniform draw per sample; pass label_uniform")
    drop = uniform < probability
    if labels.is_floating_point():
        return labels * ~drop[:, None]
    return torch.where(drop, -1, labels)


def denoising_loss(
    denoiser: nn.Module,
    latents: Tensor,
    labels: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    *,
    sigma_data: float = 0.5,
    uncertainty: bool = True,
    weighting: dict | None = None,
    label_dropout: float = 0.0,
    label_uniform: Tensor | None = None,
    dropout_mask=None,
    collect: bool = False,
) -> tuple[Tensor, LossParts]:
    """Return the loss of every sample, summed over its elements, [N] in fp32, and its detached parts.

    `latents` and unit `noise` are [N, C, H, W], `sigma` [N]; `weighting` are options of `sample_weight`; `label_uniform` [N]
    decides the label dropout and `dropout_mask(layer, shape)` the network's dropout: every draw comes from the caller.
    """
    latents, sigma = latents.float(), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
    labels = drop_labels(labels, label_uniform, label_dropout)
    noisy = latents + sigma * noise
    denoised, logvar, *seen = denoiser(
        noisy, sigma.flatten(), labels, return_logvar=True, collect=collect, dropout_mask=dropout_mask
    )
    edm_weight = sample_weight(sigma.flatten(), sigma_data)
    weight = sample_weight(sigma.flatten(), sigma_data, **weighting) if weighting else edm_weight
    logvar = logvar.flatten()
    squared = (denoised - latents).square().sum(dim=(1, 2, 3))
    num_elements = latents[0].numel()
    if uncertainty:
        losses = weight / logvar.exp() * squared + logvar * num_elements
    else:
        # The head is kept in the graph at weight zero: ZeRO expects a gradient for every parameter.
        losses = weight * squared + 0 * logvar
    unweighted = squared.detach() / num_elements
    parts = LossParts(unweighted, edm_weight * unweighted, logvar.detach(), seen[0] if seen else {}, sigma.flatten())
    return losses, parts
