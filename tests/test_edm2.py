"""The EDM2 U-Net has the published sizes and structure, and behaves the same whatever is switched on around it."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.denoiser import build
from models.edm2 import Block, Resample, magnitude_bucket
from models.magnitude import MPConv, normalize, normalize_rows_
from models.network import magnitude
from tests.test_magnitude import SMALL
from trainer.loss import denoising_loss

# Parameters by (resolution, channels, labels) and model_channels, counted on the reference (published: 125 M ... 1523 M).
PARAMETERS = {
    (64, 4, 1000): {
        64: 31_309_029,
        128: 124_713_253,
        192: 280_212_837,
        256: 497_807_781,
        320: 777_498_085,
        384: 1_119_283_749,
        448: 1_523_164_773,
    },
    (64, 4, 0): {
        64: 31_053_029,
        128: 124_201_253,
        192: 279_444_837,
        256: 496_783_781,
        320: 776_218_085,
        384: 1_117_747_749,
        448: 1_521_372_773,
    },
    (64, 3, 1000): {
        64: 31_307_877,
        128: 124_710_949,
        192: 280_209_381,
        256: 497_803_173,
        320: 777_492_325,
        384: 1_119_276_837,
        448: 1_523_156_709,
    },
}
SIZES = [(*data, width, count) for data, counts in PARAMETERS.items() for width, count in counts.items()]


def on_meta(**model):
    with torch.device("meta"):
        return build(model)


def trained_like(model=SMALL, **options):
    """Return a network with rows normalised and gains that are not 0, so that every part matters."""
    torch.manual_seed(0)
    net = build({**SMALL, **model}, **options)
    normalize_rows_(net)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gain"):
                p.copy_(torch.rand(1) + 0.3)
    return net


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(4, 2, 8, 8), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])


@pytest.mark.parametrize(("resolution", "channels", "label_dim", "width", "count"), SIZES)
def test_published_sizes(resolution, channels, label_dim, width, count):
    net = on_meta(resolution=resolution, channels=channels, label_dim=label_dim, model_channels=width)
    assert sum(p.numel() for p in net.parameters()) == count


def test_published_structure():
    net = on_meta(resolution=64, channels=4, label_dim=1000, model_channels=192)
    blocks = {name: block for name, block in net.named_modules() if isinstance(block, Block)}
    assert len(blocks) == 36 and len({block.layer for block in blocks.values()}) == 36
    assert sum(block.num_heads > 0 for block in blocks.values()) == 15
    assert sum(isinstance(module, MPConv) for module in net.modules()) == 162
    assert len(list(net.parameters())) == 199 and not any(name.endswith("bias") for name, _ in net.named_parameters())
    buffers = [f"{part}.{name}" for part in ("unet.emb_fourier", "logvar_fourier") for name in ("freqs", "phases")]
    assert [name for name, _ in net.named_buffers()] == buffers and sum(b.numel() for b in net.buffers()) == 640
    assert all(b.dtype == torch.float32 for b in net.buffers())
    heads = {name: block.num_heads for name, block in blocks.items()}
    assert heads["unet.enc.16x16_block0"] == 9 and heads["unet.dec.8x8_in0"] == 12
    assert heads["unet.enc.32x32_block0"] == heads["unet.enc.16x16_down"] == heads["unet.dec.8x8_in1"] == 0
    assert (blocks["unet.dec.8x8_block3"].in_channels, blocks["unet.dec.16x16_block0"].in_channels) == (1344, 1344)


def test_starts_at_zero_and_only_the_ends_learn_first(batch):
    x, sigma, labels = batch
    net = build(SMALL)
    normalize_rows_(net)
    c_skip = 0.25 / (sigma**2 + 0.25)
    assert torch.equal(net(x, sigma, labels), c_skip.reshape(-1, 1, 1, 1) * x)
    denoising_loss(net, x, labels, sigma, x)[0].sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad.any()} == {"unet.out_gain", "logvar_linear.weight"}


def test_narrow_blocks_go_without_attention():
    net = on_meta(**{**SMALL, "channels_per_head": 64})
    assert not any(block.num_heads for block in net.modules() if isinstance(block, Block))
    with pytest.raises(ValueError, match="channels_per_head"):
        on_meta(**{**SMALL, "model_channels": 10, "channels_per_head": 6})


def test_attention_is_cosine_attention_over_pixels():
    net = trained_like()
    block = next(b for b in net.modules() if isinstance(b, Block) and b.num_heads == 2)
    n, c, h, w = 3, block.out_channels, 4, 6
    qkv = torch.randn(n, 3 * c, h, w)
    q, k, v = (part.reshape(n, 2, c // 2, h * w) for part in qkv.chunk(3, dim=1))  # rows: q, k, v; then heads
    q, k, v = (normalize(part, dim=2) for part in (q, k, v))
    scores = torch.einsum("nhci,nhcj->nhij", q, k) / math.sqrt(c // 2)
    assert scores.abs().max() <= math.sqrt(c // 2) + 1e-4
    want = torch.einsum("nhij,nhcj->nhci", scores.softmax(-1), v).reshape(n, c, h, w)
    for memory in (torch.contiguous_format, torch.channels_last):
        assert torch.allclose(block._attend(qkv.to(memory_format=memory), None), want, atol=1e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_constants_and_sizes(taps):
    x = torch.full((2, 3, 8, 8), 1.7)
    down, up = Resample("down", taps)(x), Resample("up", taps)(x)
    assert down.shape == (2, 3, 4, 4) and up.shape == (2, 3, 16, 16)
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(down[inside], x[:, :, 1:3, 1:3]) and torch.allclose(up[..., 2:-2, 2:-2], torch.tensor(1.7))


@pytest.mark.parametrize("taps", [(1, 2, 1), (1, -1)])
def test_impossible_filters_are_refused(taps):
    with pytest.raises(ValueError, match="resample_filter"):
        on_meta(**SMALL, resample_filter=list(taps))


def test_other_sizes_of_images_work_where_levels_fit(batch):
    net = trained_like()
    assert net(torch.randn(2, 2, 12, 16), torch.ones(2)).shape == (2, 2, 12, 16)
    with pytest.raises(ValueError, match="multiples of 2"):
        net(torch.randn(2, 2, 7, 8), torch.ones(2))


@torch.no_grad()
def test_collected_magnitudes_are_those_of_the_outputs(batch):
    x, sigma, labels = batch
    net, seen = trained_like(), {}
    for name, module in net.named_modules():
        if isinstance(module, MPConv):
            module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    d, logvar, magnitudes = net(x, sigma, labels, collect=True)
    assert torch.equal(d, net(x, sigma, labels)) and torch.equal(logvar, net(x, sigma, labels, return_logvar=True)[1])
    layers = {name for name in magnitudes if not name.endswith((".clipped", ".attn_logit_max"))}
    assert layers == set(seen) and all(value.ndim == 0 for value in magnitudes.values())
    for name in layers:
        want = seen[name].flatten(1).square().mean(1).sqrt().mean()
        assert torch.allclose(magnitudes[name], want, rtol=1e-5), name
    blocks = [name for name, module in net.named_modules() if isinstance(module, Block)]
    assert all(f"{name}.clipped" in magnitudes for name in blocks)
    logits = [value for name, value in magnitudes.items() if name.endswith("attn_logit_max")]
    assert logits and all(0 < value <= math.sqrt(8) + 1e-3 for value in logits)


def test_magnitude_is_a_mean_over_samples_of_their_rms():
    h = torch.ones(2, 3, 4, 4) * torch.tensor([1.0, 3.0])[:, None, None, None]
    assert magnitude(h).item() == pytest.approx(2) and not magnitude(h.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("name", "bucket"),
    [
        ("unet.enc.64x64_block0.conv_res0", ("Enc", 64)),
        ("unet.dec.8x8_in0.attn_qkv.weight", ("Dec", 8)),
        ("unet.enc.16x16_down.emb_gain", ("Enc", 16)),
        ("unet.enc.64x64_conv", None),
        ("unet.emb_noise", None),
        ("unet.out_conv", None),
        ("logvar_linear", None),
    ],
)
def test_buckets(name, bucket):
    assert magnitude_bucket(name) == bucket


@torch.no_grad()
def test_activations_are_clipped_and_counted(batch):
    x, sigma, labels = batch
    magnitudes = trained_like({"clip_act": 0.5})(x, sigma, labels, collect=True)[2]
    assert any(value > 0.1 for name, value in magnitudes.items() if name.endswith(".clipped"))
    block, inputs = Block(4, 4, 4, encoder=False, clip_act=0.5), (torch.randn(2, 4, 4, 4), torch.randn(2, 4))
    clipped, seen = block(*inputs, collect=True)
    block.clip_act = 0
    free, nothing = block(*inputs, collect=True)
    assert clipped.abs().max() == 0.5 < free.abs().max() and torch.equal(clipped, free.clamp(-0.5, 0.5))
    assert seen["clipped"] == (free.abs() > 0.5).float().mean() and "clipped" not in nothing


def keep_mask(layer, shape):
    """Return a mask that depends on layer and place in the batch only, as the trainer's does on positions."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(layer)) >= 0.2


def test_dropout_takes_its_masks_from_the_caller(batch):
    x, sigma, labels = batch
    net, asked = trained_like({"dropout": 0.2}), []

    def mask(layer, shape):
        asked.append((layer, tuple(shape)))
        return keep_mask(layer, shape)

    with pytest.raises(ValueError, match="dropout_mask"):
        net.train()(x, sigma, labels)
    d = net.train()(x, sigma, labels, dropout_mask=mask)
    num_blocks = sum(isinstance(module, Block) for module in net.modules())
    assert [layer for layer, _ in asked] == list(range(num_blocks)) and all(shape[0] == 4 for _, shape in asked)
    plain = net.eval()(x, sigma, labels)
    assert torch.equal(plain, trained_like()(x, sigma, labels)) and not torch.allclose(d, plain, atol=1e-3)


def test_dropout_keeps_the_mean():
    block = Block(4, 4, 4, encoder=False, dropout=0.25).train()
    y = torch.ones(64, 4, 16, 16)
    kept = block._drop(y, lambda layer, shape: torch.rand(shape) >= 0.25)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3]) and abs(kept.mean() - 1) < 0.02


def test_checkpointing_changes_nothing(batch):
    x, sigma, labels = batch
    results = []
    for checkpointing in (False, True):
        net = trained_like({"dropout": 0.2}, activation_checkpointing=checkpointing).train()
        d, logvar, magnitudes = net(x, sigma, labels, collect=True, dropout_mask=keep_mask)
        (d.square().sum() + logvar.sum()).backward()
        results.append((d.detach(), magnitudes, [p.grad for p in net.parameters()]))
    (d0, m0, g0), (d1, m1, g1) = results
    assert torch.equal(d0, d1) and m0.keys() == m1.keys() and all(torch.equal(m0[name], m1[name]) for name in m0)
    assert all(torch.equal(a, b) for a, b in zip(g0, g1, strict=True))


def test_checkpointing_saves_memory(batch):
    def saved(checkpointing):
        net, total = trained_like(activation_checkpointing=checkpointing).train(), 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            net(*batch)
        return total

    assert saved(True) < saved(False) / 2


def test_pixel_norm_is_in_the_encoder_only():
    x, emb = 50 * torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    for encoder in (True, False):
        block = Block(8, 8, 4, encoder=encoder, clip_act=0)
        normalize_rows_(block)
        with torch.no_grad():
            block.conv_res1.weight.zero_()
            y = block(x, emb)[0]
        main = normalize(x, dim=1) if encoder else x
        assert torch.allclose(y, main * 0.7 / math.hypot(0.3, 0.7), rtol=1e-5)


def test_block_embedding_scales_by_one_plus_gain():
    block = Block(8, 8, 4, encoder=False)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    with torch.no_grad():
        plain = block(x, emb)[0]
        assert torch.equal(plain, block(x, torch.zeros_like(emb))[0])  # gain 0: the embedding is not seen
        block.emb_gain.fill_(1.0)
        scale = 1 + F.linear(emb, block.emb_linear.weight) / math.sqrt(4)
        y = block.conv_res0(F.silu(x)) * scale[:, :, None, None]
        y = block.conv_res1(F.silu(y))
        want = (0.7 * x + 0.3 * y) / math.hypot(0.3, 0.7)
        assert torch.allclose(block(x, emb)[0], want, atol=1e-5)
