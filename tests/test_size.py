"""The arithmetic of the login node equals what is counted on the true network."""

import pytest
import torch

from models import denoiser
from models.edm2 import Block
from trainer import flops, size
from trainer.config import CONFIGS, load, to_dict

PRESETS = sorted(p for p in CONFIGS.glob("*.yaml") if load(p).model.family == "edm2")
ODD = {"channel_mult": [3, 1], "num_blocks": 1, "attn_resolutions": [8], "channel_mult_noise": 2, "channel_mult_emb": 3}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_parameters_and_flops_of_every_preset(path):
    model = to_dict(load(path))["model"]
    found, counted = size.count(model), flops.count(model)
    assert (found.parameters, found.forward_flops) == (counted.parameters, counted.forward_flops)


def test_levels_that_get_narrower_and_no_classes():
    model = to_dict(load(CONFIGS / "quickstart.yaml"))["model"] | ODD | {"label_dim": 0}
    found, counted = size.count(model), flops.count(model)
    assert (found.parameters, found.forward_flops) == (counted.parameters, counted.forward_flops)


def saved_by(block: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of activations that autograd keeps for the backward of a block, each storage once."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t, t.untyped_storage())) or t, lambda t: t):
        block(x * 1, torch.empty(len(x), 96, device=x.device))
    found = {storage._cdata: storage.nbytes() for t, storage in kept if t.numel() >= x.shape[2] ** 2 * len(x) * 8}
    return sum(found.values())


@pytest.mark.parametrize(("encoder", "inputs", "outputs"), [(True, 8, 8), (True, 8, 16), (False, 8, 8), (False, 24, 8)])
def test_activations_kept_by_a_block(encoder, inputs, outputs):
    with torch.device("meta"):
        block = Block(inputs, outputs, 96, encoder=encoder).train()
        x = torch.empty(2, inputs, 32, 32, requires_grad=True).to(memory_format=torch.channels_last)
        measured = saved_by(block, x)
    tally = size._Tally(96, 64)
    tally.block(inputs, outputs, 32, encoder=encoder)
    assert tally.saved * 2 * 4 == measured


def test_activation_checkpointing_keeps_the_blocks_inputs():
    model = to_dict(load(CONFIGS / "quickstart.yaml"))["model"]
    kept = []
    with torch.device("meta"):
        network = denoiser.build(model, activation_checkpointing=True).train()
        shape = (2, model["channels"], model["resolution"], model["resolution"])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            network(torch.empty(shape), torch.empty(2), torch.zeros(2, dtype=torch.int64))
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    measured = sum(n for key, n in found.items() if key not in weights)
    assert measured == pytest.approx(2 * 4 * size.count(model).block_elements, rel=0.1)
