"""Denoiser D(x; sigma): EDM preconditioning (Karras et al., arXiv 2206.00364, Table 1) around a network, and EDM2's
uncertainty head u(sigma) (arXiv 2312.02696, Appendix B.9).

What a maintainer must not break: parameters, coefficients, embedding, u and D stay in fp32 whatever `activations` is;
only the network's input is cast, and convolutions and attention follow the type of their input.
"""

import torch
from torch import Tensor, nn

from models.ddpm_unet import DDPMUNet
from models.edm2 import UNet
from models.magnitude import MPConv, MPFourier
from models.network import magnitude
from models.preconditioning import PREDICTIONS, coefficients
from models.unode import UNode
from models.unode_paper import PaperUNode

ACTIVATIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Denoiser(nn.Module):
    """Precondition `unet` (of any family) so that its input and its target have unit variance at every noise level.

    c_skip = sd^2 / (s^2 + sd^2), c_out = s sd / sqrt(s^2 + sd^2), c_in = 1 / sqrt(s^2 + sd^2), c_noise = ln(s) / 4;
    `model.prediction` chooses another meaning of the network's output (models/preconditioning.py).
    """

    def __init__(self, unet: nn.Module, model: dict, activations: str = "fp32"):
        super().__init__()
        self.model = dict(model)
        self.resolution, self.channels, self.label_dim = model["resolution"], model["channels"], model["label_dim"]
        self.sigma_data = float(model.get("sigma_data", 0.5))
        self.prediction = model.get("prediction", "edm")
        self.activations = ACTIVATIONS[activations]
        self.unet = unet
        logvar_channels = model.get("logvar_channels", 128)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        return_logvar: bool = False,
        collect: bool = False,
        dropout_mask=None,
    ) -> Tensor | tuple:
        """Return D, (D, logvar [N, 1, 1, 1]) or, when `collect`, (D, logvar, magnitudes).

        `x` is fp32 [N, C, H, W]; `sigma` [N] or a 0-d tensor for the whole batch; `labels` int64 [N] (-1 = none, and
        any class outside the range counts as none), rows [N, label_dim] or None, not looked at where label_dim is 0.
        `dropout_mask(layer, shape)` gives the keep mask of a block's dropout, a function of the samples' positions; it
        is required in training mode where the model has dropout. Magnitudes are 0-d tensors by layer name, with
        "<block>.clipped" (share of clipped activations) and "<block>.attn_logit_max" beside them.
        """
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in = coefficients(self.prediction, sigma, self.sigma_data)
        c_noise = sigma.flatten().log() / 4

        # channels_last is what tensor cores and oneDNN compute in, and makes a pixel's channels contiguous
        inputs = (c_in * x).to(self.activations, memory_format=torch.channels_last)
        f, seen = self.unet(inputs, c_noise, labels, dropout_mask, collect)
        denoised = c_skip * x + c_out * f.to(torch.float32)
        if not (return_logvar or collect):
            return denoised
        logvar = self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
        if not collect:
            return denoised, logvar
        magnitudes = {f"unet.{name}": value for name, value in seen.items()}
        return denoised, logvar, magnitudes | {"logvar_linear": magnitude(logvar)}

    def function_evaluations(self) -> dict[str, int]:
        """Return how often each block evaluates the right-hand side of its ODE, by name; {} where none is one."""
        blocks = self.unet.named_modules()
        return {f"unet.{name}": block.evaluations for name, block in blocks if hasattr(block, "evaluations")}


# Config keys of the network (INTERFACES of the config group `model`); the others belong to Denoiser.
_TUPLES = ("channel_mult", "attn_resolutions", "resample_filter")
_PLAIN = ("model_channels", "channel_mult", "attn_resolutions")
_COMMON = (
    *_TUPLES,
    *("model_channels", "num_blocks", "channels_per_head", "channel_mult_noise", "channel_mult_emb", "label_balance"),
    *("concat_balance", "attn_balance", "clip_act", "dropout"),
)
_DENOISER = ("family", "resolution", "channels", "label_dim", "logvar_channels", "sigma_data", "ode", "prediction")
_ODE = {"mode": "mp", "solver": "split", "steps": 2, "adjoint": False, "rtol": 1e-3, "atol": 1e-3}
_ODE |= {"omega": 1.5708, "strength": 2.0, "hidden": 1.0, "norm": "group"}

# What a network of each family and mode is built of. A config's other keys have their defaults (trainer/model_keys.py).
NETWORKS = {
    "edm2": (UNet, (*_COMMON, "residual_balance")),
    "ddpm_unet": (DDPMUNet, (*_PLAIN, "sigma_data")),
    "unode": (UNode, _COMMON),
    "unode paper": (PaperUNode, (*_PLAIN, "sigma_data")),
    "unode released": (PaperUNode, (*_PLAIN, "sigma_data")),
}


def build(model: dict, activations: str = "fp32", activation_checkpointing: bool = False) -> Denoiser:
    """Build the denoiser that the config group `model` describes, with fresh weights from torch's generator.

    Rows are not normalised yet: `magnitude.normalize_rows_` does it for training, `use_weights_` for inference.
    Raise ValueError for an unknown family, activation type or key, a missing key and impossible sizes.
    """
    family = model.get("family", "edm2")
    if family not in NETWORKS:
        raise ValueError(f"model.family {family!r}: known families are edm2, unode, ddpm_unet; correct model.family")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations {activations!r}: choose one of {', '.join(ACTIVATIONS)}")
    if model.get("prediction", "edm") not in PREDICTIONS:
        raise ValueError(f"model.prediction {model['prediction']!r}: choose one of {', '.join(PREDICTIONS)}")
    unknown = sorted(set(model) - {*NETWORKS["edm2"][1], *_DENOISER})
    if unknown:
        raise ValueError(f"model.{unknown[0]}: no such key for the family {family}; remove it")
    for key in ("resolution", "channels", "label_dim"):
        if key not in model:
            raise ValueError(f"model.{key} is missing: state it as an integer")
    ode = _ODE | model.get("ode", {})
    network, keys = NETWORKS[f"unode {ode['mode']}" if family == "unode" and ode["mode"] != "mp" else family]
    options = {key: tuple(model[key]) if key in _TUPLES else model[key] for key in keys if key in model}
    levels = len(options.get("channel_mult", (1, 2, 3, 4)))
    if model["resolution"] % (1 << levels - 1):
        raise ValueError(
            f"model.resolution {model['resolution']}: {levels} levels (channel_mult) need a multiple of "
            f"{1 << levels - 1}; change the resolution or use fewer levels"
        )
    sizes = (model["resolution"], model["channels"], model["label_dim"])
    if family == "unode":
        options["ode"] = ode
    unet = network(*sizes, activation_checkpointing=activation_checkpointing, **options)
    return Denoiser(unet, model, activations)
