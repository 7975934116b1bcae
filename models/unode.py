"""U-Node inside EDM2: a U-Net whose blocks solve a second-order ODE, magnitude-preserving (family unode, mode mp).

The papers (arXiv 2302.00626, 2310.20092) give x'' = f(x, x') with x'(0) another part of the state; models/unode_paper.py
follows them. Here the state of every pixel is z = [x, v], half of the channels each, and

    x' = w v,    v' = -w x + k (f - v <v, f> / <v, v>),    f = f(x, v; noise level, class)

f is EDM2's residual branch, without the part along v: a force that turns the velocity and does no work. Then d/dt (|x|^2 +
|v|^2) = 2 (x.x' + v.v') = 0 per pixel, whatever f is. Runge-Kutta would keep that only to its order: its slopes, evaluated at
nearby states by the same weights, are correlated, their weighted sum is no sum of independent unit vectors, and the magnitude
drifts with every block. The step used instead ("split", Strang 1968) keeps it to rounding. With h = 1 / steps:

    rotate by w h / 2      [x, v] <- [x cos + v sin, v cos - x sin]: the flow of f = 0, orthogonal
    kick                   u = v + h k f(x, v),  v <- u |v| / |u|: on the sphere of v, h k f - v <v, h k f>/<v, v> to first order
    rotate by w h / 2

one evaluation of f a step, the same number on every rank. It is consistent (first order, because f sees v from before the
kick), so that torchdiffeq's solutions of the equation above are its limit. What a maintainer must not break: nothing is added
to z between two evaluations but by a rotation or a kick.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ode
from models.edm2 import Block, modulate
from models.magnitude import EPS, SILU_RMS, MPConv, mp_cat, rms
from models.network import Network, magnitude

SPLIT = "split"


def rotate(z: Tensor, angle: float) -> Tensor:
    """Turn every pixel's [x, v] by an angle: the flow of x' = v, v' = -x."""
    x, v = z.chunk(2, dim=1)
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.cat([torch.add(x * cos, v, alpha=sin), torch.add(v * cos, x, alpha=-sin)], dim=1)


def kick(v: Tensor, push: Tensor) -> Tensor:
    """Return v + push, scaled per pixel to the magnitude of v."""
    u = v + push
    return u * ((rms(v, 1) + EPS) / (rms(u, 1) + EPS)).to(u.dtype)


def split_steps(force, z: Tensor, steps: int, omega: float, strength: float) -> Tensor:
    """Return z(1) by `steps` magnitude-preserving steps; force(z) is f [N, C / 2, H, W]; half turns that meet are one."""
    turn = omega / steps
    z = rotate(z, turn / 2)
    for step in range(steps):
        x, v = z.chunk(2, dim=1)
        z = torch.cat([x, kick(v, force(z) * (strength / steps))], dim=1)
        z = rotate(z, turn if step < steps - 1 else turn / 2)
    return z


def field(force, omega: float, strength: float):
    """Return z -> z' of the equation above, for Runge-Kutta and for torchdiffeq."""

    def slope(z: Tensor) -> Tensor:
        x, v = z.chunk(2, dim=1)
        f = force(z)
        along = (v * f).sum(1, keepdim=True) / (v * v).sum(1, keepdim=True).clamp_min(EPS**2)
        return torch.cat([omega * v, strength * (f - v * along) - omega * x], dim=1)

    return slope


class OdeBlock(Block):
    """Resample, join the skip, change the width, solve the ODE, attend: an EDM2 block with the ODE for its residual branch.

    `ode` are the keys of the config group model.ode. `evaluations` is how often f is evaluated in a forward; for an adaptive
    solver, how often it was in the last one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        ode: dict,
        skip_channels: int = 0,
        concat_balance: float = 0.5,
        **block,
    ):
        if out_channels % 2:
            raise ValueError(
                f"a U-Node block of {out_channels} channels cannot be split into position and velocity: "
                f"make model.model_channels x model.channel_mult even"
            )
        super().__init__(in_channels + skip_channels, out_channels, emb_channels, **block)
        # f sees position and velocity and pushes the velocity: out -> inner -> out / 2
        inner = max(1, round(ode["hidden"] * out_channels / 4)) * 4
        self.conv_res0 = MPConv(out_channels, inner, (3, 3), gain=1 / SILU_RMS)
        self.emb_linear = MPConv(emb_channels, inner)
        self.conv_res1 = MPConv(inner, out_channels // 2, (3, 3), gain=1 / SILU_RMS)
        self.ode, self.concat_balance = ode, concat_balance
        self.evaluations = fixed_evaluations(ode)

    def forward(self, x: Tensor, emb: Tensor, dropout_mask=None, collect: bool = False, skip: Tensor | None = None):
        """Return the block's output [N, out, H, W] and the magnitudes when `collect`: of f, those of its last evaluation."""
        seen: dict[str, Tensor] = {}

        def see(name: str, h: Tensor) -> Tensor:
            if collect:
                seen[name] = magnitude(h)
            return h

        x = self.resample(x)
        if skip is not None:
            x = mp_cat(x, skip, self.concat_balance)
        if self.conv_skip is not None:
            x = see("conv_skip", self.conv_skip(x))
        if self.encoder:
            x = x / (rms(x, 1) + EPS).to(x.dtype)  # pixel norm

        scale = see("emb_linear", self.emb_linear(emb, gain=self.emb_gain)) + 1

        def force(z: Tensor) -> Tensor:
            y = see("conv_res0", self.conv_res0(F.silu(z)))
            y = self._drop(F.silu(modulate(y, scale)), dropout_mask)
            return see("conv_res1", self.conv_res1(y))

        return self._finish(see("state", self._solve(force, x, scale)), see, seen, collect)

    def _solve(self, force, z: Tensor, scale: Tensor) -> Tensor:
        o = self.ode
        if o["solver"] == SPLIT:
            return split_steps(force, z, o["steps"], o["omega"], o["strength"])
        parameters = (self.conv_res0.weight, self.conv_res1.weight, scale)
        z, count = solve(field(force, o["omega"], o["strength"]), z, o, parameters)
        if self.evaluations != count and not z.is_meta:  # adaptive: else the module stays as it is, for compilation
            self.evaluations = count
        return z


def fixed_evaluations(options: dict) -> int:
    """Return how often a forward evaluates f; 0 for adaptive solvers, which decide it as they go."""
    if options["solver"] in ode.ADAPTIVE:
        return 0
    return options["steps"] * (1 if options["solver"] == SPLIT else ode.stages(options["solver"]))


def solve(slope, z: Tensor, options: dict, parameters) -> tuple[Tensor, int]:
    """Return z(1) and the number of evaluations, by what the config group model.ode says.

    On meta tensors, where nothing can be compared, an adaptive solver counts as rk4 of `steps` steps.
    """
    method = options["solver"]
    if z.is_meta or not (options["adjoint"] or method in ode.ADAPTIVE):
        method = "rk4" if method in ode.ADAPTIVE else method
        return ode.fixed(slope, z, method, options["steps"]), options["steps"] * ode.stages(method)
    tolerances = {"adjoint": options["adjoint"], "rtol": options["rtol"], "atol": options["atol"]}
    return ode.by_torchdiffeq(slope, z, method, options["steps"], **tolerances, parameters=parameters)


class UNode(Network):
    """The network: image and noise level (and class) -> image, all of unit magnitude; one skip a level."""

    def __init__(
        self,
        resolution: int,
        channels: int,
        label_dim: int,
        *,
        ode: dict,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_noise: int = 0,
        channel_mult_emb: int = 0,
        num_blocks: int = 1,
        attn_resolutions: tuple[int, ...] = (16, 8),
        label_balance: float = 0.5,
        activation_checkpointing: bool = False,
        **block,
    ):
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb else max(widths)
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        self.num_levels, self.activation_checkpointing = len(widths), activation_checkpointing
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.make_embedding(noise_channels, emb_channels, label_dim, label_balance)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width = widths[0]
        for side, level in [("enc", n) for n in range(len(widths))] + [("dec", n) for n in range(len(widths))[-2::-1]]:
            res, out = resolution >> level, widths[level]
            if (side, level) == ("enc", 0):
                self.enc[f"{res}x{res}_conv"] = MPConv(channels + 1, width, (3, 3))  # ones stand in for every bias
            entries = self.enc if side == "enc" else self.dec
            for index in range(num_blocks):
                resample = ("keep" if level == 0 else "down") if side == "enc" else "up"
                entries[f"{res}x{res}_block{index}"] = OdeBlock(
                    width,
                    out,
                    emb_channels,
                    ode=ode,
                    skip_channels=out if side == "dec" and index == 0 else 0,
                    encoder=side == "enc",
                    resample=resample if index == 0 else "keep",
                    attention=res in attn_resolutions,
                    layer=sum(len(e) for e in (self.enc, self.dec)) - 1,
                    **block,
                )
                width = out
        self.num_blocks = num_blocks
        self.out_conv = MPConv(width, channels, (3, 3))

    def wire(self, x: Tensor, see, run) -> Tensor:
        """Return what the last convolution sees of the input with its ones; `run(name, block, h, skip)` runs a block on `h`."""
        skips = []
        for index, (name, entry) in enumerate(self.enc.items()):
            if index == 0:
                x = see(f"enc.{name}", entry(x))
                continue
            x = run(f"enc.{name}", entry, x)
            if index % self.num_blocks == 0:
                skips.append(x)
        skips.pop()  # of the lowest level, where the decoder begins
        for index, (name, entry) in enumerate(self.dec.items()):
            x = run(f"dec.{name}", entry, x, *([skips.pop()] if index % self.num_blocks == 0 else []))
        return x
