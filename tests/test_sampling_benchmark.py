"""Sampling: the benchmark's rows, and a compiled drawing draws what the plain one does, whole batches or not."""

import pytest
import torch

from trainer import flops, sampling_benchmark
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


def test_what_is_wrong_is_one_line(capsys):
    assert main(["--table", "sampling", "--batch", "0", "--device", "cpu"]) == 2
    assert main(["--table", "sampling", "--preset", "huge", "--device", "cpu"]) == 2
    assert main(["--table", "sampling", "--preset", "xs", "--device", "cpu", "engine.compil=true"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_drawing_is_the_plain_one(device):
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
