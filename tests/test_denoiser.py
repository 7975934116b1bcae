"""Preconditioning, labels, types of activations, and compilation of the whole denoiser."""

import pytest
import torch

from models.denoiser import build
from models.magnitude import use_weights_
from tests.test_edm2 import keep_mask, trained_like
from tests.test_magnitude import SMALL


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(4, 2, 8, 8), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])


class Recorder(torch.nn.Module):
    """A network that keeps its inputs and returns noise of unit variance."""

    def forward(self, x, c_noise, labels, dropout_mask, collect):
        self.x, self.c_noise = x, c_noise
        return torch.randn_like(x), {}


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 5.0, 80.0])
def test_inputs_and_targets_of_the_network_have_unit_variance(sigma):
    torch.manual_seed(0)
    net = build({**SMALL, "sigma_data": 0.7})
    net.unet = Recorder()
    data, noise = 0.7 * torch.randn(8, 2, 64, 64), torch.randn(8, 2, 64, 64)
    x, levels = data + sigma * noise, torch.full((8,), sigma)
    d = net(x, levels)
    assert abs(net.unet.x.std() - 1) < 0.02
    assert torch.allclose(net.unet.c_noise, levels.log() / 4)
    c_skip = 0.49 / (sigma**2 + 0.49)  # what F must be for D = data: (data - c_skip x) / c_out
    target = (data - c_skip * x) * (sigma**2 + 0.49) ** 0.5 / (sigma * 0.7)
    assert abs(target.std() - 1) < 0.02 and d.shape == x.shape


@torch.no_grad()
def test_labels_as_integers_rows_and_none(batch):
    x, sigma, labels = batch
    net = trained_like()
    d = net(x, sigma, labels)
    rows = torch.nn.functional.one_hot(labels.clamp(min=0), 3).float() * (labels >= 0)[:, None]
    assert torch.equal(d, net(x, sigma, rows))
    none = net(x, sigma)
    assert torch.allclose(none, net(x, sigma, torch.full((4,), -1)), atol=1e-6)
    assert torch.allclose(none[3], d[3], atol=1e-6) and not torch.allclose(none[0], d[0], atol=1e-3)
    assert torch.equal(net(x, sigma, labels.int()), d)


@torch.no_grad()
def test_an_unconditional_network_ignores_labels(batch):
    x, sigma, labels = batch
    net = trained_like({"label_dim": 0})
    assert torch.equal(net(x, sigma, labels), net(x, sigma)) and "unet.emb_label.weight" not in net.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("label_dim", [0, 3])
def test_one_sigma_for_the_whole_batch(batch, label_dim):
    x, _, labels = batch
    net = trained_like({"label_dim": label_dim})
    assert torch.allclose(net(x, torch.tensor(0.9), labels), net(x, torch.full((4,), 0.9), labels), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("activations", "bound"), [("fp16", 5e-3), ("bf16", 4e-2)])
def test_sixteen_bit_activations_leave_the_rest_in_fp32(batch, activations, bound):
    net, full = trained_like(activations=activations), trained_like()
    d, logvar, magnitudes = net(*batch, collect=True)
    want, logvar_of_full, _ = full(*batch, collect=True)
    assert d.dtype == torch.float32 and torch.equal(logvar, logvar_of_full)
    assert all(p.dtype == torch.float32 for p in [*net.parameters(), *net.buffers()])
    assert 0 < (d - want).abs().max() < bound * want.abs().max()
    for name in ("unet.emb_noise", "unet.emb_label", "unet.enc.8x8_block0.emb_linear"):
        assert torch.equal(magnitudes[name], full(*batch, collect=True)[2][name])


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(batch):
    x, sigma, labels = batch
    net = trained_like()
    whole = net(x, sigma, labels)
    for i in range(4):
        assert torch.allclose(whole[i : i + 1], net(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]), atol=1e-5)


@torch.no_grad()
def test_shorter_rows_are_normalised_once_at_load(batch):
    net, averaged = trained_like(), trained_like()
    for p in averaged.parameters():
        if p.ndim > 1:
            p.mul_(0.5 + 0.4 * torch.rand(p.shape[0]).reshape(-1, *[1] * (p.ndim - 1)))
    assert not torch.allclose(averaged(*batch), net(*batch), atol=1e-2)
    use_weights_(averaged)
    assert torch.allclose(averaged(*batch), net(*batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "dit"}, "model.family 'dit'"),
        ({"depth": 3}, "model.depth"),
        ({"resolution": 9}, "model.resolution 9"),
        ({"resample_filter": [1]}, "resample_filter"),
    ],
)
def test_errors_are_one_line(change, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as error:
        build({**SMALL, **change})
    assert "\n" not in str(error.value)


def test_missing_size_and_unknown_type_are_named():
    with pytest.raises(ValueError, match="model.label_dim"):
        build({"resolution": 8, "channels": 2})
    with pytest.raises(ValueError, match="fp8"):
        build(SMALL, "fp8")


@pytest.mark.slow
@pytest.mark.parametrize(("collect", "checkpointing"), [(True, False), (False, True)])
def test_compiles_as_one_graph(batch, collect, checkpointing):
    x, sigma, labels = batch
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = trained_like({"dropout": 0.2}, activation_checkpointing=checkpointing).train()
        run = torch.compile(net, fullgraph=True) if compiled else net
        masks = [keep_mask(layer, shape) for layer, shape in enumerate(shapes_of_masks(net, batch))]
        out = run(
            x,
            sigma,
            labels,
            return_logvar=True,
            collect=collect,
            dropout_mask=lambda layer, shape, masks=masks: masks[layer],
        )
        (out[0].square().sum() + out[1].sum()).backward()
        results.append((out, [p.grad for p in net.parameters()]))
    (eager, eager_grads), (compiled, compiled_grads) = results
    assert torch.allclose(eager[0], compiled[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(eager_grads, compiled_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max())
    if collect:
        assert eager[2].keys() == compiled[2].keys()
        assert all(torch.allclose(eager[2][name], compiled[2][name], atol=1e-5) for name in eager[2])


def shapes_of_masks(net, batch):
    shapes = []

    def note(layer, shape):
        shapes.append(tuple(shape))
        return torch.ones(shape, dtype=torch.bool)

    with torch.no_grad():
        net(*batch, dropout_mask=note)
    return shapes[: net.unet.num_blocks]
