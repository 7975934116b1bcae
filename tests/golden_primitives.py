"""Golden checks of the elementary operators and of single blocks."""

import re

import torch
from torch import Tensor

from models import import_edm2, magnitude
from models.edm2 import Block, Resample
from tests.golden import OUTPUT, Report, Vectors, in_use


def primitives(file: Vectors, report: Report) -> None:
    """Compare normalisation, MP operators, resampling, the learned layer and single blocks."""

    def close(name: str, got: Tensor, bound: float = OUTPUT) -> None:
        report.close(file.name, name, got, file[name], bound)

    x = file["x"]
    close("normalize_dim1", magnitude.normalize(x, dim=1))
    close("normalize_all", magnitude.normalize(x))
    close("zeros_normalize", magnitude.normalize(torch.zeros_like(file["zeros_normalize"])))
    close("mp_silu", magnitude.mp_silu(x))
    for name in file.tensors:
        if name.startswith("mp_sum_t"):
            close(name, magnitude.mp_sum(x, file["b6"], float(name.removeprefix("mp_sum_t"))))
        if name.startswith("mp_cat_t"):
            close(name, magnitude.mp_cat(x, file["b10"], float(name.removeprefix("mp_cat_t"))))
        if match := re.fullmatch(r"(down|up)(\d+)", name):
            close(name, Resample(match[1], tuple(int(tap) for tap in match[2]))(x))
    fourier = magnitude.MPFourier(file["fourier_freqs"].numel())
    fourier.load_state_dict({"freqs": file["fourier_freqs"], "phases": file["fourier_phases"]})
    close("fourier_out", fourier(file["c_noise"]))
    with torch.no_grad():
        _learned_layer(file, report)
    for name in file.tensors:
        if name.endswith(".out"):
            _block(file, report, name.removesuffix(".out"))


def _learned_layer(file: Vectors, report: Report) -> None:
    w, x = file["w"], file["x"]
    conv = magnitude.MPConv(w.shape[1], w.shape[0], tuple(w.shape[2:]))
    conv.weight.copy_(w)
    once = in_use(conv)
    report.close(file.name, "w_norm1", once.weight, file["w_norm1"], OUTPUT)
    report.close(file.name, "w_norm2", in_use(once).weight, file["w_norm2"], OUTPUT)
    report.close(
        file.name,
        "mpconv_weight_after_train_forward",
        once.weight,
        file["mpconv_weight_after_train_forward"],
        OUTPUT,
    )
    report.close(file.name, "mpconv_eval", once(x), file["mpconv_eval"], OUTPUT)
    gain = float(re.search(r"gain ([\d.]+)", file.facts["tensors"]["mpconv_eval_gain"]["about"])[1])
    report.close(file.name, "mpconv_eval_gain", once(x, gain), file["mpconv_eval_gain"], OUTPUT)
    magnitude.normalize_rows_(conv)
    report.close(file.name, "mpconv_train (rows at the fixed point)", conv(x), file["mpconv_train"], OUTPUT)
    w = file["linear_w"]
    linear = magnitude.MPConv(w.shape[1], w.shape[0])
    linear.weight.copy_(w)
    report.close(file.name, "linear_out", in_use(linear)(file["linear_in"]), file["linear_out"], OUTPUT)


def _block(file: Vectors, report: Report, name: str) -> None:
    _, flavor, resample, attention, clip = name.split("_", 4)
    x, emb, out = file[f"{name}.x"], file[f"{name}.emb"], file[f"{name}.out"]
    block = Block(
        x.shape[1],
        out.shape[1],
        emb.shape[1],
        encoder=flavor == "enc",
        resample=resample,
        attention=attention == "attn",
        channels_per_head=file.facts["block_channels_per_head"],
        clip_act=float(clip.removeprefix("clip")),
    )
    state = {key: value for key, value in file.under(f"{name}.").items() if key not in ("x", "emb", "out")}
    block.load_state_dict({key: import_edm2.from_reference(f".{key}", value) for key, value in state.items()})
    with torch.no_grad():
        report.close(file.name, name, in_use(block)(x, emb)[0], out, OUTPUT)
