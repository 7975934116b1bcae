"""Whitening laws: standard deviation sigma_data, exactly invertible, and only with the constants that the data came with."""

import numpy as np
import pytest
import torch

from data_pipeline import codecs, latents, manifest, wds
from tests.shards import make_dataset
from tests.test_manifest import some_manifest


def test_posterior_is_sampled_as_the_reference_does():
    """(mean + normal * std) * scale + bias, scale = 0.5 / std, bias = -mean * scale (Karras et al. 2024)."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(6, 8, 64, 64, generator=generator).abs().half() * 4
    normal = torch.randn(6, 4, 64, 64, generator=generator)
    scale = 0.5 / torch.tensor([4.17, 4.62, 3.71, 3.28]).view(1, 4, 1, 1)
    bias = -torch.tensor([5.81, 3.25, 0.12, -2.15]).view(1, 4, 1, 1) * scale
    expected = (stored[:, :4].float() + normal * stored[:, 4:].float()) * scale + bias
    x = latents.whiten(stored, some_manifest(), normal)
    assert x.dtype == torch.float32 and torch.allclose(x, expected, atol=2e-6)
    mean = latents.whiten(stored, some_manifest())
    assert torch.allclose(latents.unwhiten(mean, some_manifest()), stored[:, :4].float(), atol=1e-5)


def test_rgb_is_the_usual_convention():
    m = some_manifest(
        codec="pixels",
        codec_hash="",
        moments="mean",
        dtype="uint8",
        shape=(3, 2, 2),
        mean=manifest.RGB_MEAN,
        std=manifest.RGB_STD,
    )
    pixels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    x = latents.whiten(pixels, m)
    assert torch.allclose(x, pixels.float() / 127.5 - 1, atol=1e-6)
    assert torch.equal(latents.decode(x, m), pixels)
    assert latents.decode(torch.full((1, 3, 2, 2), 9.0), m).unique().tolist() == [255]


def test_measured_constants_whiten_what_they_were_measured_on(tmp_path):
    make_dataset(tmp_path, codec="mine")
    with wds.open_source(tmp_path, 0, 1) as source:
        x = latents.whiten(source.batch(np.arange(source.manifest.num_samples)).stored, source.manifest)
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-4)
    assert torch.allclose(x.std(dim=(0, 2, 3)), torch.full((8,), 0.5), atol=2e-3)


def test_other_shapes_and_codecs_are_refused():
    with pytest.raises(ValueError, match="as in the manifest"):
        latents.whiten(torch.zeros(2, 4, 64, 64), some_manifest())
    pixels = some_manifest(codec="pixels", moments="mean", shape=(4, 64, 64))
    vae = some_manifest(codec_hash="")
    with pytest.raises(ValueError, match="made with codec sd-vae-ft-mse, not pixels"):
        latents.decode(torch.zeros(1, 4, 64, 64), vae, codecs.open_codec("pixels"))
    with pytest.raises(ValueError, match="hash"):
        codecs.check_is(codecs.Pixels("pixels", "other"), pixels)


def tiny_weights(path):
    """Write random weights in tinyae4's layout."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {f"latent.{n}": torch.tensor([1.0, 2, 3, 4]) for n in ("u_mean", "u_std", "raw_mean", "raw_std")}

    def conv(name, outputs, inputs, size, bias=True):
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, size, size) * 0.02
        if bias:
            tensors[f"{name}.bias"] = torch.randn(outputs) * 0.02

    for side, blocks, first, last in (("encoder", 3, 192, 4), ("decoder", 4, 4, 192)):
        conv(f"{side}.inp", 96, first, 1 if side == "encoder" else 3)
        conv(f"{side}.skip", last, first, 1, bias=False)
        conv(f"{side}.out", last, 96, 3)
        for block in range(blocks):
            conv(f"{side}.blocks.{block}.a", 96, 96, 3)
            conv(f"{side}.blocks.{block}.b", 96, 96, 3)
    save_file(tensors, path)


def test_tiny_autoencoder_has_its_shapes(tmp_path):
    tiny_weights(tmp_path / "w.safetensors")
    codec = codecs.open_codec("tinyae4", tmp_path / "w.safetensors")
    stored = codec.encode(torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8))
    assert stored.shape == (2, 4, 2, 3) and stored.dtype == np.float16
    pictures = codec.decode(torch.from_numpy(stored).float())
    assert pictures.shape == (2, 3, 16, 24) and pictures.dtype == torch.uint8
    assert len(codec.hash) == 64


@pytest.mark.extras
def test_vae_stores_its_posterior(tmp_path):
    """Pixels in [0, 1]; mean and standard deviation unscaled; decoding truncates (Karras et al. 2024, reference)."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 8], layers_per_block=1, latent_channels=4, norm_num_groups=4, **blocks
    )
    vae.save_pretrained(tmp_path)
    codec = codecs.open_codec("sd-vae-ft-mse", tmp_path, dtype="float32")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    stored = torch.from_numpy(codec.encode(images))
    posterior = vae.eval().encode(images.float() / 255).latent_dist
    assert stored.shape == (2, 8, 8, 8) and codec.factor == 2
    assert torch.allclose(stored, torch.cat([posterior.mean, posterior.std], dim=1).detach(), atol=1e-6)
    expected = (vae.decode(stored[:, :4]).sample.detach().clamp(0, 1) * 255).to(torch.uint8)
    assert torch.equal(codec.decode(stored[:, :4]), expected)
    half = codecs.open_codec("sd-vae-ft-mse", tmp_path, dtype="float32", decoding="fp16")
    assert np.array_equal(half.encode(images), stored.numpy()), "it encodes in fp32 all the same"
    far = (half.decode(stored[:, :4]).int() - expected.int()).abs()
    assert 0 < far.max() <= 4 and far.float().mean() < 0.2  # eps of fp16 is 2^-11; bf16 gives 9 here
    with pytest.raises(ValueError, match="decodes in fp32 alone"):
        codecs.open_codec("pixels", decoding="fp16")
    x = latents.whiten(stored, some_manifest(shape=(8, 8, 8)))
    pictures = latents.decode(x, some_manifest(shape=(8, 8, 8), codec_hash=codec.hash), codec)
    assert (pictures.int() - expected.int()).abs().max() <= 1


@pytest.mark.extras
def test_taesd_keeps_diffusers_scale(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    layers = {f"{side}_block_out_channels": (8, 8, 8, 8) for side in ("encoder", "decoder")}
    counts = {f"num_{side}_blocks": (1, 1, 1, 1) for side in ("encoder", "decoder")}
    network = diffusers.AutoencoderTiny(**layers, **counts)
    network.save_pretrained(tmp_path)
    codec = codecs.open_codec("taesd", tmp_path, dtype="float32")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    stored = torch.from_numpy(codec.encode(images))
    assert stored.shape == (2, 4, 2, 2) and codec.factor == 8
    expected = network.eval().encode(images.float() / 127.5 - 1).latents
    assert torch.allclose(stored, expected.detach(), atol=1e-6)
    assert codec.decode(stored).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", ["sd-vae-ft-mse", "taesd"])
def test_networks_without_weights_or_library_are_one_line(tmp_path, name):
    with pytest.raises(ValueError, match="diffusers|--codec-weights"):
        codecs.open_codec(name, tmp_path)
