"""FLOPs are those of a closed formula, of the published table, and of a counted training step."""

import json
import math

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.ddpm_unet import Attention
from models.denoiser import build
from models.edm2 import Block
from models.magnitude import MPConv
from tests.test_magnitude import SMALL
from trainer import flops
from trainer.config import CONFIGS

IMG512 = {"resolution": 64, "channels": 4, "label_dim": 1000}
# 2 per multiply-accumulate, counted on the reference; GMAC are half of it (the paper's 45.5 ... 552.1 count 1 % more)
PUBLISHED = {
    64: 22.693e9,
    128: 89.907e9,
    192: 201.645e9,
    256: 357.904e9,
    320: 558.687e9,
    384: 803.991e9,
    448: 1093.818e9,
}


PLAIN = {**SMALL, "model_channels": 16}


def closed_formula(model):
    """Add up 2 out in k^2 H W of every layer and 4 C T^2 of every attention, T = H W, from a forward on meta tensors."""
    total = 0

    def layer(module, inputs, output):
        nonlocal total
        total += 2 * module.weight.numel() * math.prod(output.shape[2:])

    def attention(module, inputs, output):
        nonlocal total
        total += 4 * module.out_channels * math.prod(output[0].shape[2:]) ** 2 if module.num_heads else 0

    def plain_attention(module, inputs, output):
        nonlocal total
        pixels = math.prod(output.shape[2:])  # twice 4 heads of 32 channels against pixels, or channels
        total += 4 * 128 * pixels * (32 if module.linear else pixels)

    with torch.device("meta"):
        net = build(model)
        for module in net.modules():
            if isinstance(module, MPConv | nn.Conv2d | nn.Linear):
                module.register_forward_hook(layer)
            elif isinstance(module, Attention):
                module.register_forward_hook(plain_attention)
            elif isinstance(module, Block):
                module.register_forward_hook(attention)
        net(torch.empty(1, net.channels, net.resolution, net.resolution), torch.empty(1), None, return_logvar=True)
    return total


@pytest.mark.parametrize(
    "model",
    [
        *(SMALL, {**SMALL, "label_dim": 0}, {**SMALL, "attn_resolutions": [8, 4]}, {**IMG512, "model_channels": 64}),
        {**SMALL, "family": "unode"},  # an ODE's layers are called, and counted, once an evaluation
        {**SMALL, "family": "unode", "ode": {"solver": "rk4", "steps": 3}},
        {**PLAIN, "family": "unode", "ode": {"mode": "paper", "solver": "midpoint", "steps": 2}},
        {**PLAIN, "family": "unode", "label_dim": 0, "ode": {"mode": "released", "solver": "rk4", "steps": 1}},
        {**PLAIN, "family": "ddpm_unet"},
    ],
    ids=str,
)
def test_count_is_the_closed_formula(model):
    counts = flops.count(model)
    assert counts.forward_flops == closed_formula(model) == sum(counts.by_operation.values())


@pytest.mark.parametrize("width", PUBLISHED)
def test_count_is_within_a_percent_of_the_reference(width):
    counts = flops.count({**IMG512, "model_channels": width})
    assert counts.forward_flops == pytest.approx(PUBLISHED[width], rel=1e-2)
    assert counts.training_flops_per_image == 3 * counts.forward_flops


def test_training_is_three_forwards():
    model = {**IMG512, "model_channels": 64}
    with torch.device("meta"):
        net = build(model)
        inputs = (torch.empty(2, 4, 64, 64), torch.empty(2), torch.zeros(2, dtype=torch.long))
        with FlopCounterMode(display=False) as counter:
            d, logvar = net(*inputs, return_logvar=True)
            (d.sum() + logvar.sum()).backward()
    # a little less: the image itself needs no gradient
    assert counter.get_total_flops() / 2 == pytest.approx(flops.count(model).training_flops_per_image, rel=0.01)


def test_levels_and_layers_add_up():
    counts = flops.count(SMALL)
    assert sum(level.forward_flops for level in counts.levels) == counts.forward_flops
    assert sum(level.parameters for level in counts.levels) == counts.parameters == counts.trainable_parameters
    assert [level.name for level in counts.levels][1:] == ["Enc 8x8", "Enc 4x4", "Dec 4x4", "Dec 8x8"]
    with torch.device("meta"):
        leaves = [name for name, module in build(SMALL).named_modules() if isinstance(module, MPConv)]
    attention = sum(counts.by_layer[name] for name in counts.by_layer if name.count(".") == 2 and "block" in name)
    assert attention and all(counts.by_layer[name] > 0 for name in leaves)


def test_counting_makes_no_weights(monkeypatch):
    made = []
    original = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: made.append(original(*a, **k).device.type) or original(*a, **k))
    flops.count(SMALL)
    assert set(made) == {"meta"}


@pytest.mark.parametrize("averages", [0, 2, 3])
def test_bytes_by_stage(averages):
    held = flops.bytes_per_parameter(averages)
    assert list(held) == ["0", "1", "2", "3"] and held["0"]["sharded"] == held["3"]["replicated"] == 0
    masters = 4  # ZeRO's copy of the weights
    for stage in held.values():
        assert sum(stage.values()) == 16 + 4 * averages + (masters if stage["sharded"] else 0)
    replicated = [held[stage]["replicated"] for stage in held]
    assert replicated == sorted(replicated, reverse=True)


@pytest.mark.parametrize(
    ("device", "activations", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 494.7e12),
    ],
)
def test_named_peaks(device, activations, peak):
    assert flops.peak_flops(device, activations)[1] == peak


def test_unknown_devices_have_no_peak():
    assert flops.peak_flops("cpu", "fp32") is None


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    plain = {"run": "runs/x", "duration_images": 1024, "global_batch": 16, "micro_batch": 4, "model": SMALL}
    plain |= {"data": {"path": "data/x"}, "cluster": {"ranks_per_node": 2}}
    path.write_text(yaml.safe_dump(plain))
    return path


def test_json_has_the_agreed_keys(config, capsys):
    assert flops.main([str(config), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    counts = flops.count(SMALL)
    assert facts["parameters"] == facts["trainable_parameters"] == counts.parameters
    assert facts["forward_flops"] == counts.forward_flops == 2 * facts["forward_macs"]
    assert facts["training_flops_per_image"] == 3 * counts.forward_flops
    assert facts["bytes_per_parameter"] == {"0": 24.0, "1": 8 + 20 / 2, "2": 4 + 24 / 2, "3": 28 / 2}


def test_published_totals_with_and_without_frozen_tables_and_evaluations_are_told(capsys):
    assert flops.main([str(CONFIGS / "unode_released.yaml"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["network_parameters"], facts["network_parameters_with_frozen_tables"]) == (8_555_875, 8_811_875)
    assert set(facts["function_evaluations"].values()) == {4} and not facts["adaptive"]
    assert [level["name"] for level in facts["levels"]][1:3] == ["Enc 64x64", "Enc 32x32"] and len(
        facts["levels"]
    ) == 10
    fixed = ["model.ode.solver=rk4", "model.ode.steps=3"]
    totals = []
    for overrides in (fixed, ["model.ode.solver=dopri5", "model.ode.steps=3", "engine.compile=false"]):
        assert flops.main([str(CONFIGS / "unode_s.yaml"), *overrides]) == 0
        out = capsys.readouterr().out
        totals.append(out.split("training")[0])
        assert ("an adaptive solver decides" in out) == (overrides is not fixed)
    assert totals[0] == totals[1]


def test_table_has_a_row_per_level(config, capsys):
    assert flops.main([str(config)]) == 0
    out = capsys.readouterr().out
    for word in ("Enc 8x8", "Dec 4x4", "GFLOP", "GMAC", "ZeRO stage 3", "multiply-accumulate"):
        assert word in out


def test_errors_are_one_line_and_exit_2(config, capsys):
    config.write_text(config.read_text().replace("duration_images", "duration"))
    for path in (str(config), str(config.parent / "absent.yaml")):
        assert flops.main([path]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
