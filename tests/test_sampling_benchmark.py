"""Sampling: the benchmark's rows, and a compiled drawing draws what the plain one does, whole batches or not."""

from types import SimpleNamespace

import pytest
import torch

from data_pipeline import codecs
from trainer import decoding_benchmark, flops, sampling_benchmark
from trainer.benchmark import main
from trainer.drawing import Drawing, Settings


def test_rows_count_both_networks():
    rows = sampling_benchmark.measure(None, 2, 2, "cpu", False, 1)
    assert [r["guide"] for r in rows] == list(sampling_benchmark.WAYS)
    assert [bool(r["one_batch_gains"]) for r in rows] == [False, False, False, True]
    each = [r["flops_per_second"] / r["images_per_second"] for r in rows]
    forward = flops.count(sampling_benchmark.SMALL).forward_flops
    assert each[0] == pytest.approx(3 * forward)
    assert each[2:] == pytest.approx([6 * forward, 6 * forward])
    assert each[0] < each[1] < each[2]


def test_decoding_has_rows_of_its_own():
    rows = sampling_benchmark.measure(None, 1, 2, "cpu", False, 1, decoder=codecs.open_codec("pixels"))
    assert [r["decoder"] for r in rows] == [None] * 4 + ["pixels, in turn", "pixels, beside the next"] * 2
    assert [r["guide"] for r in rows[4:]] == ["none"] * 2 + ["half the channels"] * 2
    assert all(r["images_per_second"] > 0 for r in rows)


@pytest.mark.extras
def test_the_decoder_of_the_published_rates_is_counted():
    """Karras et al. 2024: 1260.9 G multiply-accumulates an image; ours leave out the elementwise ones."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**codecs.SD_VAE).eval()
        drawing = SimpleNamespace(shape=(4, 64, 64), device="meta")
        counted = decoding_benchmark.decoder_flops(codecs.StabilityVae(vae, "", "meta", "float16"), drawing)
    assert counted == pytest.approx(2 * 1260.9e9, rel=0.005)


def test_what_is_wrong_is_one_line(capsys):
    assert main(["--table", "sampling", "--batch", "0", "--device", "cpu"]) == 2
    assert main(["--table", "sampling", "--preset", "huge", "--device", "cpu"]) == 2
    assert main(["--table", "sampling", "--preset", "xs", "--device", "cpu", "engine.compil=true"]) == 2
    assert main(["--table", "sampling", "--decoder", "nowhere", "--device", "cpu"]) == 2
    assert main(["--table", "optimizer", "--decoder", "pixels"]) == 2
    assert capsys.readouterr().err.count("\n") == 5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--micro-batch", "4"],
        ["--rounds", "2"],
        ["--batch", "4", "--preset", "xs"],
        ["--way", "eager", "--preset", "xs"],
        ["--way", "eager", "--table", "sampling"],
        ["--table", "optimizer", "--preset", "xs"],
        ["--table", "optimizer", "--device", "cuda"],
        ["--table", "sampling", "--micro-batch", "4"],
        ["--table", "fusion", "--profile", "here"],
        ["engine.compile=true"],
    ],
)
def test_what_a_table_does_not_know_is_not_passed_over(arguments, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and any(words in told for words in ("goes with --", "go with --", "is of CPUs"))


DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
def test_pictures_decoded_beside_are_those_in_turn(device, monkeypatch):
    """Guided in an interval, in batches that do not divide; from a GPU too, where rounding may move a pixel by a step."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = sampling_benchmark.SMALL | {"num_blocks": 1, "channel_mult": [1, 2], "model_channels": 16}
    data = {"codec": "pixels", "codec_hash": "", "mean": [100.0] * 4, "std": [60.0] * 4}
    header = {"model": model, "data": data, "noise": {"density": "lognormal", "P_mean": -0.4, "P_std": 1.0}}
    settings = Settings(steps=3, guidance=1.5, interval=(0.1, 20.0))
    one, other = (
        Drawing(sampling_benchmark._network(model, "fp32", w), header, settings, None, w) for w in ("cpu", device)
    )
    expected = torch.cat([one.decode(x) for _, x in one.batches(range(7), 3)])
    found = list(other.decoded(range(7), 3))
    assert [p for where, _ in found for p in where] == list(range(7))
    far = (torch.cat([pictures for _, pictures in found]).int() - expected.int()).abs()
    assert expected.float().std() > 10 and far.max() <= (0 if device == "cpu" else 1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_drawing_is_the_plain_one(device, monkeypatch):
    # torch lets cuDNN convolve fp32 in TF32: 2^-11 a factor, more than is allowed here after five guided evaluations
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = sampling_benchmark.SMALL | {"num_blocks": 1, "channel_mult": [1, 2], "model_channels": 16}
    header = {"model": model, "data": {}, "noise": {"density": "lognormal", "P_mean": -0.4, "P_std": 1.0}}
    settings = Settings(steps=3, guidance=1.5, interval=(0.1, 20.0))

    def drawing(where):
        return Drawing(sampling_benchmark._network(model, "fp32", where), header, settings, None, where)

    plain, compiled = drawing("cpu"), drawing(device)
    compiled.compile()
    expected, found = (torch.cat([x.cpu() for _, x in d.batches(range(5), 2)]) for d in (plain, compiled))
    assert found.shape == expected.shape == (5, 4, 16, 16)
    assert float((found - expected).norm() / expected.norm()) < 1e-3  # Winograd's rounding, through five evaluations
