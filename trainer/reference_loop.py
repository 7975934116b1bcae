"""A training step of EDM2's reference (github.com/NVlabs/edm2), run from the user's own clone: the row `reference` of a preset.

Its licence is CC BY-NC-SA 4.0, so nothing of it is here: its network and averages are called as its published training calls them.
The loss is written from the paper (arXiv 2312.02696, Eq. 21). It is timed at its best: data are drawn on the device instead of
read, and there is no DistributedDataParallel around it.
"""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import hardware
from trainer.config import Config
from trainer.engine import device
from trainer.groups import Model
from trainer.loss import sample_weight

NEEDED = ("training/networks_edm2.py", "training/phema.py")
# our keys that a preset leaves alone, but an override might not, by the names that its network knows
NAMES = {key: key for key in ("channel_mult", "num_blocks", "attn_resolutions", "channels_per_head", "channel_mult_noise",
                              "channel_mult_emb", "label_balance", "concat_balance", "attn_balance", "clip_act",
                              "resample_filter", "logvar_channels")} | {"residual_balance": "res_balance"}  # fmt: skip
BETAS = (0.9, 0.99)  # of its Adam


def find(folder: str) -> Path:
    """Return the clone's absolute path; ValueError where it is none."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(f"--reference {folder}: no such folder; clone github.com/NVlabs/edm2 and name that folder")
    for name in NEEDED:
        if not (path / name).is_file():
            raise ValueError(
                f"--reference {folder}: has no {name}; name the folder of a clone of github.com/NVlabs/edm2"
            )
    return path


@contextmanager
def _told(folder: Path, what: str):
    """Turn what another's code raises into one line: any exception may come out of it."""
    try:
        yield
    except Exception as error:
        if hardware.ran_out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"--reference {folder}: {what} failed with {type(error).__name__}: {said}; "
            f"it must be a clone of github.com/NVlabs/edm2 that runs on torch {torch.__version__}"
        ) from error


class ReferenceLoop:
    """Steps of the reference, timed by part; `config` says which network, and how many images at once."""

    name, compiled = "reference", False

    def __init__(self, config: Config, folder: Path):
        self.config, self.clock, self.where, self.folder = config, 0, device(), folder
        m, batch = config.model, config.micro_batch
        if m.family != "edm2" or m.prediction != "edm":
            raise ValueError(f"--reference with model.family={m.family}: the reference has EDM2's network alone")
        half = config.engine.activations != "fp32" and self.where.type == "cuda"
        self.activations = "fp16" if half else "fp32"
        if self.where.type == "cuda":  # as its training sets them
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.manual_seed(config.seed)
        sys.path.insert(0, str(folder))
        with _told(folder, "import training.networks_edm2"):
            network, averages = (importlib.import_module(f"training.{name}") for name in ("networks_edm2", "phema"))
        with _told(folder, "training.networks_edm2.Precond"):
            self.net = network.Precond(**_options(config, half))
            self.net.train().requires_grad_(True).to(self.where)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1e-4, betas=BETAS)
        with _told(folder, "training.phema.PowerFunctionEMA"):
            self.averages = averages.PowerFunctionEMA(self.net, stds=list(config.ema.sigma_rel))
        self.shape = (batch, m.channels, m.resolution, m.resolution)
        self.labels = None
        if m.label_dim:
            self.labels = F.one_hot(torch.randint(m.label_dim, (batch,)), m.label_dim).float().to(self.where)
        self.phases = hardware.Phases(self.where)

    def loss(self, latents: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor) -> Tensor:
        """Return the loss summed over all elements; `sigma` is [N, 1, 1, 1], labels are one-hot."""
        with _told(self.folder, "net(x, sigma, labels, return_logvar=True)"):
            denoised, logvar = self.net(latents + sigma * noise, sigma, labels, return_logvar=True)
            if denoised.shape != latents.shape or logvar.shape != sigma.shape:
                raise TypeError(f"it returned shapes {tuple(denoised.shape)} and {tuple(logvar.shape)}")
        weight = sample_weight(sigma, self.config.model.sigma_data)
        return (weight / logvar.exp() * (denoised - latents).square() + logvar).sum()

    def step(self) -> None:
        """Do a step: draw, loss and backward of each micro-batch, gradients made finite, Adam, averages."""
        batch = self.config.global_batch
        self.adam.zero_grad(set_to_none=True)
        for _ in range(batch // self.config.micro_batch):
            self._micro_step(batch)
        self.clock += batch
        with self.phases.measure("optimizer"):
            for p in self.net.parameters():
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
            self.adam.step()
            with _told(self.folder, "PowerFunctionEMA.update(cur_nimg=..., batch_size=...)"):
                self.averages.update(cur_nimg=self.clock, batch_size=batch)

    def _micro_step(self, batch: int) -> None:
        noise = self.config.noise
        with self.phases.measure("examples"):
            latents, unit = (torch.randn(self.shape, device=self.where) for _ in range(2))
            sigma = torch.randn([len(latents), 1, 1, 1], device=self.where)
            sigma = (sigma * noise.P_std + noise.P_mean).exp()
        with self.phases.measure("forward"):
            loss = self.loss(latents * self.config.model.sigma_data, self.labels, sigma, unit)
        with self.phases.measure("backward"), _told(self.folder, "the backward of its network"):
            (loss / batch).backward()

    def communication_seconds(self) -> float:
        """Return 0: nothing is sent."""
        return 0.0

    def close(self) -> None:
        """Leave nothing behind."""


def _options(config: Config, half: bool) -> dict:
    """Return the options of its network: what it is told by its own training, and what differs from the published one."""
    m, published = config.model, Model()
    options = {"img_resolution": m.resolution, "img_channels": m.channels, "label_dim": m.label_dim, "use_fp16": half,
               "sigma_data": m.sigma_data, "model_channels": m.model_channels, "dropout": m.dropout}  # fmt: skip
    for key, name in NAMES.items():
        if (value := getattr(m, key)) != getattr(published, key):
            options[name] = value
    if options.get("clip_act") == 0:  # off
        options["clip_act"] = None
    return options
