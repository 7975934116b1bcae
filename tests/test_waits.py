"""On a GPU no training step and no evaluation of a sampler waits for the device: torch raises where one would (`pytest -m gpu`)."""

import math
from contextlib import contextmanager

import pytest
import torch

from data_pipeline.devices import own_device
from models import sampler
from models.denoiser import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL = ["model.resolution=16", "model.model_channels=32", "model.channels_per_head=32"]


@contextmanager
def no_waiting():
    """Let every copy that waits for the device raise; waiting for an event, as the step does for the one before, does not count."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("bare", "accumulate"), [(True, 1), (True, 2), (False, 2)]
)  # DeepSpeed starts once in a process
def test_a_step(bare, accumulate):
    from trainer import timed_loop
    from trainer.preset_config import compose

    if not bare:
        pytest.importorskip("deepspeed")
    loop = timed_loop.Loop(compose("xxs", [*SMALL, f"global_batch={4 * accumulate}"], 4, on_gpu=True), bare)
    try:
        for _ in range(4):  # compiles; DeepSpeed's clock, were it on, would begin to wait at the third
            loop.step()
        with no_waiting():
            for _ in range(3):
                loop.step()
    finally:
        loop.close()


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.1, 20.0)])
@pytest.mark.parametrize("solver", list(sampler.SOLVERS))
def test_an_evaluation(solver, interval):
    options = {
        "resolution": 16,
        "channels": 4,
        "label_dim": 3,
        "model_channels": 32,
        "channel_mult": [1],
        "num_blocks": 1,
    }
    network = build(options).eval().requires_grad_(False).to(own_device())
    x, labels = torch.randn(4, 4, 16, 16, device=own_device()), torch.zeros(4, dtype=torch.int64, device=own_device())
    sigmas = sampler.grid("edm", 4, 0.002, 80.0, 0.5)

    def denoise(x, sigma):
        return network(x, sigma, labels)

    guided = sampler.guidance(denoise, denoise, 1.5, interval)
    sampler.SOLVERS[solver](guided, x, sigmas)  # libraries start
    with no_waiting():
        sampler.SOLVERS[solver](guided, x, sigmas)
