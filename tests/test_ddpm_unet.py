"""The discrete baseline has the published size, at any size it is a denoiser like the others, and Adam trains it."""

import pytest
import torch

from models.denoiser import build
from models.magnitude import normalized_parameters
from tests.test_optimizer import optimizer_of
from trainer.loss import denoising_loss

PUBLISHED = {"family": "ddpm_unet", "resolution": 64, "channels": 3, "label_dim": 0, "model_channels": 64}
PUBLISHED |= {"channel_mult": [1, 2, 4, 8], "attn_resolutions": [8]}
SMALL = {**PUBLISHED, "resolution": 8, "channels": 2, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2]}
SMALL |= {"attn_resolutions": [4], "logvar_channels": 8}


def batch():
    torch.manual_seed(1)
    return torch.randn(4, 2, 8, 8), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in build(PUBLISHED).unet.parameters()) == 35_710_339


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [{}, {"channel_mult": [1, 2, 2]}, {"attn_resolutions": []}, {"label_dim": 0}], ids=str
)
def test_it_is_a_denoiser_of_any_size(change):
    x, sigma, labels = batch()
    net = build({**SMALL, **change}).eval()
    d, logvar, seen = net(x, sigma, labels, collect=True)
    assert d.shape == x.shape and logvar.shape == (4, 1, 1, 1) and len(seen) > 8
    assert not torch.allclose(d, net(x, 2 * sigma, labels))
    assert torch.equal(net(x, sigma, None), d) == ("label_dim" in change)
    for i in range(4):
        assert torch.allclose(d[i : i + 1], net(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("activations", "bound"), [("fp16", 1e-2), ("bf16", 5e-2)])
def test_sixteen_bits_are_near(activations, bound):
    torch.manual_seed(0)
    full = build(SMALL).eval()
    half = build(SMALL, activations).eval()
    half.load_state_dict(full.state_dict())
    d, want = half(*batch()), full(*batch())
    assert d.dtype == torch.float32 and 0 < (d - want).abs().max() < bound * want.abs().max()


def test_checkpointing_changes_no_gradient():
    x, sigma, labels = batch()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = build(SMALL, activation_checkpointing=checkpointing).train()
        net(x, sigma, labels).square().sum().backward()
        grads.append([p.grad for p in net.unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_optimizer_takes_a_network_without_rows_for_plain_adam():
    """Two steps equal those of torch's Adam, bitwise."""
    nets = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = build(SMALL).unet.train()
        assert normalized_parameters(net) == {}
        if ours:
            adam, optimizer = optimizer_of(net, lr=1e-3)
        else:
            adam = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, fused=True)
        x, sigma, labels = batch()
        for step in range(2):
            adam.zero_grad()
            net(x, sigma.log() / 4, labels)[0].square().sum().backward()
            if ours:
                optimizer.schedule(1e-3, 1.0, 4 * (step + 1), 4)
            adam.step()
        nets.append(net)
    assert float(optimizer.row_rms_deviation()) == 0
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_every_parameter_gets_a_gradient_from_the_loss():
    x, sigma, labels = batch()
    net = build(SMALL).train()
    losses, _ = denoising_loss(net, x, labels, sigma, torch.randn_like(x))
    losses.sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
