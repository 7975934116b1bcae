"""The U-Node of the papers: the released network has its published size, cost and blindness; the described one is of second
order, sees the noise level, and has torchdiffeq's gradients."""

import pytest
import torch
import torch.nn.functional as F
import torchdiffeq
import yaml

from models.denoiser import build
from models.unode_paper import PaperField, StateBlock
from tests.test_ddpm_unet import PUBLISHED as BASELINE
from tests.test_unode import assert_compiles
from trainer import flops
from trainer.config import CONFIGS, load, to_dict

RELEASED = {"family": "unode", "resolution": 64, "channels": 3, "label_dim": 0, "model_channels": 32}
RELEASED |= {"channel_mult": [1, 2, 4, 8, 16], "attn_resolutions": [8]}
RELEASED |= {"ode": {"mode": "released", "solver": "rk4", "steps": 1, "norm": "instance"}}
PAPER = {**RELEASED, "ode": {"mode": "paper", "solver": "rk4", "steps": 1}}
SMALL = {"resolution": 8, "channels": 2, "model_channels": 16, "channel_mult": [1, 2], "attn_resolutions": [4]}
SMALL |= {"logvar_channels": 8}
SMALL_RELEASED = {**RELEASED, **SMALL}
SMALL_PAPER = {**PAPER, **SMALL, "label_dim": 3}


def batch():
    torch.manual_seed(1)
    return torch.randn(4, 2, 8, 8), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])


def made(model, **options):
    """A network whose zero-initialised layers are not zero, so that every part of it matters."""
    torch.manual_seed(0)
    net = build(model, **options)
    with torch.no_grad():
        for field in (m for m in net.modules() if isinstance(m, PaperField)):
            for p in (*field.conv1.parameters(), *field.emb_linear.parameters()):
                p.normal_(0, 0.1)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# As released: totals of the authors' notebook and their multiply-accumulates, recounted (thop leaves attention's products out)


@pytest.mark.parametrize(
    ("attention", "total", "gmac"), [([8], 8_811_875, 2.823), ([32, 8, 4], 9_140_835, 2.894), ([], 8_548_707, 2.806)]
)
def test_the_released_network_has_the_published_parameters_and_cost(attention, total, gmac):
    model = {**RELEASED, "attn_resolutions": attention}
    counts = flops.count(model)
    with torch.device("meta"):
        unet = build(model).unet
    trainable, frozen = (sum(t.numel() for t in ts) for ts in (unet.parameters(), unet.buffers()))
    assert (trainable + frozen, frozen) == (total, 256_000)
    assert counts.by_operation["aten.convolution"] / 2e9 == pytest.approx(gmac, abs=6e-4)


def test_each_of_its_blocks_evaluates_its_right_hand_side_four_times():
    with torch.device("meta"):
        net, calls = build(RELEASED), []
        for block in (m for m in net.modules() if isinstance(m, StateBlock)):
            block.field.register_forward_hook(lambda *_: calls.append(1))
        net(torch.empty(1, 3, 64, 64), torch.empty(1))
    assert set(net.function_evaluations().values()) == {4} and len(net.function_evaluations()) == 9
    assert len(calls) == 4 * 9


def test_the_papers_ratios_by_our_own_counter():
    """It claims about 0.25 of the parameters, which is so, and about 0.30 of the FLOPs, which is 0.39."""
    ours, baseline = flops.count(RELEASED), flops.count(BASELINE)
    head = 128  # of the uncertainty head, which both have
    assert (ours.parameters - head + 256_000) / (baseline.parameters - head) == pytest.approx(0.247, abs=5e-4)
    assert ours.forward_flops / baseline.forward_flops == pytest.approx(0.387, abs=2e-3)
    convolutions = [c.by_operation["aten.convolution"] for c in (ours, baseline)]
    assert convolutions[0] / convolutions[1] == pytest.approx(0.392, abs=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_the_released_network_computes_what_the_authors_does(norm):
    """Their network written out from its description, with torchdiffeq's rk4 as they call it, and this one's weights."""
    torch.manual_seed(0)
    model = {**RELEASED, "resolution": 16, "channel_mult": [1, 2, 4], "attn_resolutions": [4, 8]}
    net = build({**model, "ode": {**RELEASED["ode"], "norm": norm}}).unet.double()
    for p in net.parameters():
        p.normal_(0, 0.1)
    weights = dict(net.named_parameters())

    def conv(x, name):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def solve(z, at):
        normal = F.instance_norm if norm == "instance" else lambda y: F.group_norm(y, 8)

        def slope(t, z):
            y = F.softplus(conv(normal(z), f"{at}.field.conv0"))
            return F.softplus(conv(normal(y), f"{at}.field.conv1")) + z

        return torchdiffeq.odeint(slope, z, torch.tensor([0.0, 1.0], dtype=z.dtype), method="rk4")[-1]

    def attend(z, at):  # what comes out of attention replaces the state
        if f"{at}.attention.norm.gain" not in weights:
            return z
        y = F.normalize(z, dim=1) * weights[f"{at}.attention.norm.gain"][:, None, None] * z.shape[1] ** 0.5
        q, k, v = conv(y, f"{at}.attention.qkv").reshape(len(z), 3, 4, 32, -1).unbind(1)
        seen = torch.softmax(q.mT @ k / 32**0.5, dim=-1) @ v.mT
        return conv(seen.mT.reshape(len(z), 128, *z.shape[2:]), f"{at}.attention.out")

    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    z = F.softplus(conv(F.instance_norm(F.softplus(conv(F.instance_norm(x), "stem.conv0"))), "stem.conv1"))
    skips = []
    for size in (16, 8, 4):
        at = f"enc.{size}x{size}_ode"
        if size < 16:
            z = F.interpolate(F.softplus(conv(z, f"{at}.change")), scale_factor=0.5, mode="bilinear")
        skips.append(solve(z, at))
        z = attend(skips[-1], at)
    for size in (8, 16):
        at, skip = f"dec.{size}x{size}_ode", skips[{8: 1, 16: 0}[size]]
        z = torch.cat([F.interpolate(z, scale_factor=2.0, mode="bilinear"), skip], dim=1)
        z = attend(solve(F.softplus(conv(z, f"{at}.change")), at), at)
    torch.testing.assert_close(net(x, torch.zeros(2), None)[0], conv(z, "out_conv"), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_released_network_never_sees_the_noise_level():
    x, sigma, _ = batch()
    net = made(SMALL_RELEASED).unet.eval()
    a, b = (net(x, c_noise, None)[0] for c_noise in (sigma.log() / 4, sigma.log() * 3))
    assert torch.equal(a, b) and not torch.allclose(a, net(x.flip(3), sigma, None)[0])


# ---------------------------------------------------------------------------------------------------------------------
# As described


def test_the_described_network_has_the_ledgers_parameters():
    """6,848,131 are the authors' stem, no conditioning and the frozen table: exchange those for what is here."""
    with torch.device("meta"):
        net = build(PAPER).unet
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    fields = [m for m in net.modules() if isinstance(m, PaperField)]
    film = sum(p.numel() for f in fields for p in f.emb_linear.parameters())
    norms = sum(p.numel() for f in fields for norm in (f.norm0, f.norm1) for p in norm.parameters())
    stem = (27 * 16 + 16) + (16 * 32 + 32)
    rest = sum(count.values()) - film - norms - count["embedding"] - count["stem"] - count["position"]
    assert rest == 6_848_131 - 256_000 - stem


@torch.no_grad()
def test_the_block_is_of_second_order():
    """x' is v itself, and with a force of zero x moves by v alone, exactly."""
    torch.manual_seed(0)
    field, z, film = PaperField(16), torch.randn(2, 16, 4, 4), torch.randn(2, 32, 1, 1)
    slope = field(z, film)
    assert torch.equal(slope[:, :8], z[:, 8:]) and not slope[:, 8:].any()
    block = StateBlock(
        16, 16, mode="paper", ode=build(SMALL_PAPER).unet.enc["8x8_ode"].ode, resample=1.0, attention=False
    )
    after, _ = block(z, torch.randn(2, 256))
    torch.testing.assert_close(after, torch.cat([z[:, :8] + z[:, 8:], z[:, 8:]], dim=1))


@torch.no_grad()
def test_the_force_is_norm_convolution_softplus_norm_scale_and_shift_convolution():
    torch.manual_seed(0)
    field, z, film = PaperField(16), torch.randn(2, 16, 4, 4), torch.randn(2, 32, 1, 1)
    for p in field.parameters():
        p.normal_(0, 0.2)
    y = F.group_norm(z, 8, field.norm0.weight, field.norm0.bias)
    y = F.softplus(F.conv2d(y, field.conv0.weight, field.conv0.bias, padding=1))
    y = F.group_norm(y, 8, field.norm1.weight, field.norm1.bias) * (1 + film[:, :16]) + film[:, 16:]
    force = F.conv2d(y, field.conv1.weight, field.conv1.bias, padding=1)
    torch.testing.assert_close(field(z, film), torch.cat([z[:, 8:], force], dim=1))


@torch.no_grad()
def test_noise_level_and_class_reach_the_force():
    x, sigma, labels = batch()
    net = made(SMALL_PAPER).eval()
    d = net(x, sigma, labels)
    assert not torch.allclose(net.unet(x, sigma, labels)[0], net.unet(x, 2 * sigma, labels)[0], atol=1e-4)
    assert not torch.allclose(d[0], net(x, sigma, None)[0], atol=1e-4)
    for i in range(4):
        assert torch.allclose(d[i : i + 1], net(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]), atol=1e-5)


def gradients(model, **options):
    net = made(model, **options).train()
    net(*batch()).square().sum().backward()
    return {name: p.grad for name, p in net.unet.named_parameters()}


def test_gradients_through_the_steps_are_those_of_torchdiffeqs_adjoint():
    """The adjoint is exact in the limit of small steps; both ways come to it with the fourth order of rk4."""
    for steps, bound in ((8, 1e-2), (32, 1e-4)):
        through, adjoint = (
            gradients({**SMALL_PAPER, "ode": {**PAPER["ode"], "steps": steps, "adjoint": adjoint}})
            for adjoint in (False, True)
        )
        for name, g in through.items():
            assert g is not None and g.abs().sum() > 0, name
            assert (g - adjoint[name]).norm() < bound * g.norm(), (steps, name)


def test_adaptive_steps_agree_with_fixed_ones_and_are_counted():
    fixed = made({**SMALL_PAPER, "ode": {**PAPER["ode"], "steps": 8}})
    adaptive = made({**SMALL_PAPER, "ode": {"mode": "paper", "solver": "dopri5", "rtol": 1e-5, "atol": 1e-5}})
    torch.testing.assert_close(adaptive(*batch()), fixed(*batch()), rtol=1e-3, atol=1e-3)
    counts = adaptive.function_evaluations()
    assert len(counts) == 3 and all(n >= 8 for n in counts.values())


@pytest.mark.parametrize("model", [SMALL_PAPER, SMALL_RELEASED], ids=["paper", "released"])
def test_checkpointing_changes_no_gradient(model):
    plain, checkpointed = gradients(model), gradients(model, activation_checkpointing=True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@torch.no_grad()
@pytest.mark.parametrize("model", [SMALL_PAPER, SMALL_RELEASED], ids=["paper", "released"])
def test_sixteen_bits_are_near(model):
    d, want = made(model, activations="bf16")(*batch()), made(model)(*batch())
    assert d.dtype == torch.float32 and 0 < (d - want).abs().max() < 6e-2 * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL_PAPER, SMALL_RELEASED], ids=["paper", "released"])
def test_compiles_as_one_graph(model):
    assert_compiles(lambda: made(model).train(), batch())


# ---------------------------------------------------------------------------------------------------------------------
# Configs


def test_presets_name_these_networks():
    for name, model in (("unode_released", RELEASED), ("unode_paper", PAPER), ("ddpm_unet", BASELINE)):
        found = to_dict(load(CONFIGS / f"{name}.yaml"))["model"]
        assert {key: found[key] for key in model if key != "ode"} == {k: v for k, v in model.items() if k != "ode"}
        assert {key: found["ode"][key] for key in model.get("ode", {})} == model.get("ode", {})


@pytest.mark.parametrize(
    ("name", "other"), [*((f"unode_{s}", f"edm2_{s}") for s in ("s", "m", "xl")), ("unode_quickstart", "quickstart")]
)
def test_presets_cost_a_quarter_of_their_edm2(name, other):
    """At most 0.25 of the parameters and 0.30 of the FLOPs of the EDM2 of the same widths, levels and recipe."""
    unode, edm2 = (to_dict(load(CONFIGS / f"{n}.yaml")) for n in (name, other))
    a, b = flops.count(unode["model"]), flops.count(edm2["model"])
    assert a.parameters <= 0.25 * b.parameters and a.forward_flops <= 0.30 * b.forward_flops
    for key in ("lr", "optimizer", "noise", "ema", "global_batch", "duration_images", "engine", "snapshots"):
        assert unode[key] == edm2[key]
    for key in ("model_channels", "channel_mult", "attn_resolutions", "dropout", "resolution", "channels", "label_dim"):
        assert unode["model"][key] == edm2["model"][key]
    head = (CONFIGS / f"{name}.yaml").read_text().split("defaults:")[0]
    small = f"{a.parameters:,} parameters, {a.forward_flops / 1e6:.1f} MFLOP"
    assert small in head or f"{a.parameters / 1e6:.1f} M parameters, {a.forward_flops / 1e9:.1f} GFLOP" in head
    for ratio in (a.parameters / b.parameters, a.forward_flops / b.forward_flops):
        assert f"{ratio:.3f}" in head


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"family": "unode", "residual_balance": 0.4},
            "model.residual_balance=0.4: means nothing to the family unode mp",
        ),
        ({"family": "ddpm_unet", "dropout": 0.1}, "model.dropout=0.1: means nothing to the family ddpm_unet"),
        (
            {"family": "unode", "model_channels": 33},
            "model.model_channels=33: makes a level of 33 channels, and unode mp needs a multiple of 2; try 34",
        ),
        ({"family": "ddpm_unet", "model_channels": 12}, "12 channels, and ddpm_unet needs a multiple of 8; try 16"),
        (
            {"family": "unode", "model_channels": 12, "ode": {"mode": "paper", "solver": "rk4"}},
            "12 channels, and unode paper needs a multiple of 8; try 16",
        ),
        ({"ode": {"steps": 3}}, "model.ode.steps=3: means nothing to the family edm2"),
        ({"family": "unode", "ode": {"mode": "paper"}}, "model.ode.solver=split: .* set model.ode.solver=rk4"),
        ({"family": "unode", "ode": {"adjoint": True}}, "model.ode.adjoint=true: needs a Runge-Kutta solver"),
        (
            {"family": "unode", "ode": {"solver": "bosh3", "rtol": 0, "atol": 1e-9}},
            "rtol=0 and atol=1e-09: .* at least 1e-7",
        ),
        ({"family": "unode", "label_dim": 10, "ode": {"mode": "released", "solver": "rk4"}}, "model.label_dim=10"),
        ({"family": "unode", "ode": {"speed": 3}}, "model.ode.speed: unknown key"),
    ],
    ids=str,
)
def test_keys_without_meaning_and_solvers_that_do_not_fit_are_refused_in_one_line(model, said, tmp_path):
    plain = {"run": "r", "duration_images": 16, "global_batch": 16, "micro_batch": 16, "data": {"path": "d"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**plain, "model": model}))
    with pytest.raises(ValueError, match=said) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_adaptive_solvers_are_not_compiled(tmp_path):
    with pytest.raises(ValueError, match="solver=dopri5: does not compile as one graph; set engine.compile=false"):
        load(CONFIGS / "unode_s.yaml", ["model.ode.solver=dopri5"])
    assert load(CONFIGS / "unode_s.yaml", ["model.ode.solver=dopri5", "engine.compile=false"])
