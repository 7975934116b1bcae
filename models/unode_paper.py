"""The U-Node of the papers (arXiv 2302.00626, 2310.20092): a U-Net whose blocks are ODEs (family unode, modes paper, released).

Both keep a state of `model_channels` x `channel_mult` channels a level, change levels by 1x1 convolutions and bilinear
resampling, concatenate one skip a level and use softplus. What differs is said in two classes:

    paper      x'' = f(x, x', noise level, class), x(0) and x'(0) = g(x(0)): the state is [x, v] and x' is v
    released   z' = f(z) + z: what the authors' released network computes, of first order and without the noise level

What a maintainer must not break: the released network's parameters are counted (8,811,875 with attention at 8, 9,140,835 at
32, 8 and 4, its frozen table included), and it must not depend on the noise level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.ddpm_unet import Attention, Conv, GroupNorm, NoiseEmbedding
from models.network import magnitude
from models.unode import fixed_evaluations, solve

EMB_CHANNELS = 256  # of the released table, and of the working embedding


class ReleasedField(nn.Module):
    """f(z) + z of the released network: twice norm, convolution, softplus; nothing else enters."""

    def __init__(self, channels: int, group_norm: bool):
        super().__init__()
        self.conv0 = Conv(channels, channels, 3, padding=1)
        self.conv1 = Conv(channels, channels, 3, padding=1)
        # its final experiments normalise 8 groups of channels, the code as released single channels; neither has parameters
        self.norm = GroupNorm(channels, affine=False) if group_norm else nn.InstanceNorm2d(channels)

    def forward(self, z: Tensor, emb: Tensor | None) -> Tensor:
        """Return the slope of the state [N, C, H, W]."""
        y = F.softplus(self.conv0(self.norm(z)))
        return F.softplus(self.conv1(self.norm(y))) + z

    def inputs(self, emb: Tensor | None) -> tuple[None, list[Tensor]]:
        """Return what enters besides the state, nothing, and all that a gradient may want."""
        return None, list(self.parameters())


class PaperField(nn.Module):
    """[x, v]' = [v, f(x, v)]: f is group norm, convolution, softplus, group norm, scale and shift, convolution.

    The last convolution begins at zero: x moves by v, and v stays. The embedding is constant during the solve.
    """

    def __init__(self, channels: int, group_norm: bool = True):
        super().__init__()
        if channels % 2:
            raise ValueError(
                f"a state of {channels} channels has no two halves: make model.model_channels x model.channel_mult even"
            )
        self.norm0, self.norm1 = GroupNorm(channels), GroupNorm(channels)
        self.conv0 = Conv(channels, channels, 3, padding=1)
        self.conv1 = Conv(channels, channels // 2, 3, padding=1)
        self.emb_linear = nn.Linear(EMB_CHANNELS, 2 * channels)
        for layer in (self.conv1, self.emb_linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, film: Tensor) -> Tensor:
        """Return the slope of the state [N, C, H, W]; `film` [N, 2 C, 1, 1] are scales and shifts."""
        v = z[:, z.shape[1] // 2 :]
        scale, shift = film.to(z.dtype).chunk(2, dim=1)
        y = F.softplus(self.conv0(self.norm0(z)))
        return torch.cat([v, self.conv1(self.norm1(y) * (scale + 1) + shift)], dim=1)

    def inputs(self, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return scales and shifts, and every tensor of the slope that may want a gradient."""
        film = self.emb_linear(F.silu(emb))[:, :, None, None]
        layers = (self.norm0, self.norm1, self.conv0, self.conv1)
        return film, [film, *(p for layer in layers for p in layer.parameters())]


class InitialVelocity(nn.Module):
    """x'(0) = g(x(0)): norm, 3x3 convolution to half of the state, softplus, norm, 1x1 convolution.

    As released it is the whole stem, from the image to the state, and ends in another softplus.
    """

    def __init__(self, in_channels: int, half: int, out_channels: int, released: bool):
        super().__init__()
        self.conv0 = Conv(in_channels, half, 3, padding=1)
        self.conv1 = Conv(half, out_channels, 1)
        self.released = released

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, H, W]."""
        y = self.conv1(F.instance_norm(F.softplus(self.conv0(F.instance_norm(x)))))
        return F.softplus(y) if self.released else y


class StateBlock(nn.Module):
    """Change level and width, join the skip, solve the ODE, attend.

    Attention as released replaces the state; the paper's mode adds it.
    """

    def __init__(self, in_channels: int, channels: int, *, mode: str, ode: dict, resample: float, attention: bool):
        super().__init__()
        self.change = Conv(in_channels, channels, 1) if in_channels != channels else None
        self.field = {"paper": PaperField, "released": ReleasedField}[mode](channels, ode["norm"] == "group")
        self.attention = Attention(channels) if attention else None
        self.mode, self.ode, self.resample = mode, ode, resample
        self.evaluations = fixed_evaluations(ode)

    def forward(self, z: Tensor, emb: Tensor | None, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the state after the block, and the solution before attention, which is the level's skip."""
        if self.resample == 2.0:  # up: enlarge, then change
            z = F.interpolate(z, scale_factor=2.0, mode="bilinear", align_corners=False)
            z = torch.cat([z, skip], dim=1)
        if self.change is not None:
            z = F.softplus(self.change(z))
        if self.resample == 0.5:  # down: change, then shrink
            z = F.interpolate(z, scale_factor=0.5, mode="bilinear", align_corners=False)
        inputs, wanted = self.field.inputs(emb)
        z, count = solve(lambda state: self.field(state, inputs), z, self.ode, wanted)
        if self.evaluations != count and not z.is_meta:  # adaptive: else the module stays as it is, for compilation
            self.evaluations = count
        if self.attention is None:
            return z, z
        y = self.attention(z)
        return (y if self.mode == "released" else z + y), z


class PaperUNode(nn.Module):
    """The network: image and noise level (and class) -> image; `ode` are the keys of the config group model.ode."""

    def __init__(
        self,
        resolution: int,
        channels: int,
        label_dim: int,
        *,
        ode: dict,
        model_channels: int = 32,
        channel_mult: tuple[int, ...] = (1, 2, 4, 8, 16),
        attn_resolutions: tuple[int, ...] = (8,),
        sigma_data: float = 0.5,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        mode, widths = ode["mode"], [model_channels * mult for mult in channel_mult]
        self.mode, self.activation_checkpointing = mode, activation_checkpointing
        half = model_channels // 2
        if mode == "released":
            if label_dim:
                raise ValueError(
                    f"model.label_dim={label_dim}: the released network sees no class; set model.label_dim=0"
                )
            self.stem, self.position, self.embedding = InitialVelocity(channels, half, model_channels, True), None, None
            self.register_buffer("table", _table())
        else:
            self.position = Conv(channels, half, 3, padding=1)
            self.stem = InitialVelocity(half, half, model_channels - half, False)
            self.embedding = NoiseEmbedding(EMB_CHANNELS, EMB_CHANNELS, label_dim, sigma_data)

        def block(in_channels: int, level: int, resample: float) -> StateBlock:
            attention = resolution >> level in attn_resolutions
            return StateBlock(in_channels, widths[level], mode=mode, ode=ode, resample=resample, attention=attention)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for level, width in enumerate(widths):
            at = f"{resolution >> level}x{resolution >> level}"
            self.enc[f"{at}_ode"] = block(widths[level - 1] if level else width, level, 0.5 if level else 1.0)
        for level in reversed(range(len(widths) - 1)):
            at = f"{resolution >> level}x{resolution >> level}"
            self.dec[f"{at}_ode"] = block(widths[level + 1] + widths[level], level, 2.0)
        self.out_conv = Conv(model_channels, channels, 1)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, dropout_mask=None, collect: bool = False
    ) -> tuple[Tensor, dict]:
        """Return F [N, C, H, W] in the type of `x`, and the magnitude of every block's state when `collect`."""
        emb = None if self.embedding is None else self.embedding(c_noise, labels)
        if self.position is not None:
            x = self.position(x)
        z = self.stem(x) if self.position is None else torch.cat([x, self.stem(x)], dim=1)
        seen: dict[str, Tensor] = {}

        def run(name: str, block: StateBlock, z: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if self.activation_checkpointing and self.training:
                z, solution = checkpoint(block, z, emb, skip, use_reentrant=False, preserve_rng_state=False)
            else:
                z, solution = block(z, emb, skip)
            if collect:
                seen[f"{name}.state"] = magnitude(solution)
            return z, solution

        skips = []
        for name, block in self.enc.items():
            z, solution = run(f"enc.{name}", block, z)
            skips.append(solution)
        skips.pop()  # the lowest level's, where the decoder begins
        for name, block in self.dec.items():
            z, _ = run(f"dec.{name}", block, z, skips.pop())
        return self.out_conv(z), seen


def _table() -> Tensor:
    """Return the released table of times: even columns sin, odd columns cos, of the even columns' frequencies [1000, 256].

    Frequency of column j is 10000^(-2 j / 256) for even j (j, where sinusoids have j / 2). Frozen, and never read.
    """
    frequency = 10000.0 ** (-2 * torch.arange(0, EMB_CHANNELS, 2) / EMB_CHANNELS)
    angle = torch.outer(torch.arange(1000.0), frequency)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
