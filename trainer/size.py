"""The size of an EDM2 network by arithmetic: parameters, FLOPs and stored activations, without torch.

A login node prices a run with it in no time; `trainer.flops` counts the true network and a test says when the two differ. Follows
the wiring of models/edm2.py (config G, arXiv 2312.02696, Fig. 21): a change there is a change here.
"""

from dataclasses import dataclass

TRAINING_FORWARDS = 3  # one forward, and a backward of two products for each of the forward's


@dataclass(frozen=True)
class Size:
    """What one network costs; FLOPs are 2 per multiply-accumulate, for one image."""

    parameters: int
    forward_flops: int
    saved_elements: int  # activations of one image that backward needs
    block_elements: int  # ... of which the inputs of the blocks: what activation checkpointing keeps


def count(model: dict) -> Size | None:
    """Return the size of the network in config group `model`, None for a family that only `trainer.flops` can count."""
    if model.get("family", "edm2") != "edm2":
        return None
    widths = [model["model_channels"] * mult for mult in model["channel_mult"]]
    noise = model["model_channels"] * model["channel_mult_noise"] or widths[0]
    emb = model["model_channels"] * model["channel_mult_emb"] or max(widths)
    tally = _Tally(emb, model["channels_per_head"])
    tally.linear(noise, emb)
    tally.linear(model["label_dim"], emb)
    tally.linear(model["logvar_channels"], 1)

    skips, width = [], model["channels"] + 1
    for level, out in enumerate(widths):
        res = model["resolution"] >> level
        if level == 0:
            tally.conv(width, out, 3, res)
            width = out
        else:
            tally.block(width, width, res, encoder=True)
        skips.append(width)
        for _ in range(model["num_blocks"]):
            tally.block(width, out, res, res in model["attn_resolutions"], encoder=True)
            width = out
            skips.append(width)
    for level, out in reversed(list(enumerate(widths))):
        res = model["resolution"] >> level
        if level == len(widths) - 1:
            tally.block(width, width, res, attention=True)
            tally.block(width, width, res)
        else:
            tally.block(width, width, res)
        for _ in range(model["num_blocks"] + 1):
            tally.block(width + skips.pop(), out, res, res in model["attn_resolutions"])
            width = out
    tally.conv(width, model["channels"], 3, model["resolution"])
    tally.parameters += 1  # out_gain
    return Size(tally.parameters, 2 * tally.macs, tally.saved, tally.kept)


def bytes_per_parameter(num_averages: int, weights: str = "fp32", prepared: bool = False) -> dict[str, dict[str, int]]:
    """Return the bytes a rank holds per parameter, by ZeRO stage: "replicated" on every rank and "sharded" over ranks.

    Module weights 4 (2 where `weights` is bf16); all else is fp32: gradients 4, Adam's moments 8, averages 4 each; ZeRO keeps
    another copy of the weights, the masters, in its shards. Stage 0 shards nothing. `prepared` weights (models/prepared.py) are 2
    more, at most, but at stage 3. Activations and communication buffers are not included.
    """
    more = 2 if prepared else 0
    weights, gradients, moments, masters, averages = {"fp32": 4, "bf16": 2}[weights], 4, 8, 4, 4 * num_averages
    return {
        "0": {"replicated": weights + more + gradients + moments + averages, "sharded": 0},
        "1": {"replicated": weights + more + gradients, "sharded": masters + moments + averages},
        "2": {"replicated": weights + more, "sharded": gradients + masters + moments + averages},
        "3": {"replicated": 0, "sharded": weights + gradients + masters + moments + averages},
    }


class _Tally:
    """Sums over layers."""

    def __init__(self, emb: int, channels_per_head: int):
        self.emb, self.channels_per_head = emb, channels_per_head
        self.parameters = self.macs = self.saved = self.kept = 0

    def linear(self, inputs: int, outputs: int) -> None:
        self.parameters += inputs * outputs
        self.macs += inputs * outputs

    def conv(self, inputs: int, outputs: int, kernel: int, res: int) -> None:
        weights = inputs * outputs * kernel**2
        self.parameters += weights
        self.macs += weights * res**2
        self.saved += inputs * res**2  # a convolution's gradient needs its input

    def block(self, inputs: int, outputs: int, res: int, attention: bool = False, encoder: bool = False) -> None:
        """Add one residual block [inputs -> outputs] at `res`, with attention where it is wide enough for a head."""
        self.parameters += 1  # emb_gain
        self.linear(self.emb, outputs)
        if inputs != outputs:
            self.conv(inputs, outputs, 1, res)
        self.conv(
            outputs if encoder else inputs, outputs, 3, res
        )  # an encoder block narrows before, a decoder block in it
        self.conv(outputs, outputs, 3, res)
        pixels = outputs * res**2
        # the factors of the modulation, the second SiLU's input, the clamp's; before them the first SiLU's and the pixel norm's
        self.saved += (5 if encoder else 3 + (inputs == outputs)) * pixels
        self.kept += inputs * res**2
        if attention and outputs // self.channels_per_head:
            self.conv(outputs, 3 * outputs, 1, res)
            self.conv(outputs, outputs, 1, res)
            self.macs += 2 * outputs * res**4  # q k^T and its product with v
            self.saved += 6 * pixels  # q, k and v before and after their normalisation
