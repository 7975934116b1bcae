"""What decoding costs sampling: batches drawn and decoded to pictures on the host, in turn and beside one another (overlap.py)."""

import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline import codecs
from trainer.drawing import Drawing


def opened(name: str, device: str) -> codecs.Codec:
    """Return the decoder of `--decoder`, on GPUs in fp16; ValueError for what is none."""
    decoding = "fp16" if device == "cuda" else "fp32"
    if name == "pixels":
        return codecs.open_codec(name)
    if name == "sd-vae":
        return codecs.untrained_vae(device, decoding)
    if not Path(name).is_dir():
        raise ValueError(
            f"--decoder {name}: is neither sd-vae, nor pixels, nor a folder with weights of an AutoencoderKL"
        )
    return codecs.open_codec("sd-vae-ft-mse", name, device, decoding=decoding)


def decoder_flops(decoder: codecs.Codec, drawing: Drawing) -> int:
    """Return what decoding one image takes, counted."""
    with FlopCounterMode(display=False) as counter:
        decoder.decode(torch.zeros(1, *drawing.shape, device=drawing.device))
    return counter.get_total_flops()


def rates(drawing: Drawing, decoder: codecs.Codec, batch: int, repeats: int) -> dict[str, float]:
    """Return images/s of `repeats` + 1 batches, the best of two rounds in alternation after one for warming up.

    The last batch is decoded beside nothing, so that more batches gain more.
    """
    drawing.codec, drawing.warned = decoder, True
    ones = [1.0] * drawing.shape[0]
    drawing.data = SimpleNamespace(codec=decoder.name, codec_hash="", mean=ones, std=ones)
    positions = range(batch * (repeats + 1))

    def in_turn() -> None:
        for _, x in drawing.batches(positions, batch):
            drawing.decode(x)

    def beside() -> None:
        for _ in drawing.decoded(positions, batch):
            pass

    ways, seconds = {"in turn": in_turn, "beside the next": beside}, {"in turn": [], "beside the next": []}
    for _ in range(3):
        for how, draw in ways.items():
            started = time.perf_counter()
            draw()  # ends when the last picture is on the host
            seconds[how].append(time.perf_counter() - started)
    return {how: len(positions) / min(taken[1:]) for how, taken in seconds.items()}
