"""Published EDM2 pickles -> safetensors snapshots of ours, without executing anything in them; and our weights back
under the reference's names.

    python -m models.import_edm2 IN.pkl OUT.safetensors
    python -m models.import_edm2 --export IN.safetensors OUT.safetensors

Nothing is written unless all of it is understood: names, shapes and options must be exactly those of a network that
models/denoiser.py builds. What a maintainer must not break: the qkv layout below, or every imported network is wrong.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.denoiser import build
from models.inert_pickle import Node, persistent, plain, read_nodes, tensor

FORMAT_VERSION = 1  # of the snapshot header
# Whitening of the reference's encoders by class: raw latents have this mean and standard deviation per channel.
ENCODERS = {
    "StabilityVAEEncoder": ("sd-vae-ft-mse", "mean_std", (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)),
    "StandardRGBEncoder": ("pixels", "mean", (127.5,) * 3, (63.75,) * 3),
}

# The reference's constructor arguments and what they are called here; those left out have these defaults.
DEFAULTS = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": 0,
    "channel_mult_emb": 0,
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "channels_per_head": 64,
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "residual_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256.0,
    "dropout": 0.0,
    "resample_filter": [1, 1],
    "logvar_channels": 128,
    "sigma_data": 0.5,
}
RENAMED = {"img_resolution": "resolution", "img_channels": "channels", "res_balance": "residual_balance"}
IGNORED = {"use_fp16"}  # a choice of the run, not of the network


# ---------------------------------------------------------------------------------------------------------------------
# The network inside


def _collect(node, prefix: str, tensors: dict[str, Tensor], blocks: list[dict], depth: int = 0) -> None:
    """Walk modules as torch's state_dict would, filling `tensors` by name and `blocks` with the state of U-Net blocks."""
    if depth > 8 or not isinstance(node, Node):
        raise ValueError(f"refused: no module at {prefix or 'the top'}")
    if node.kind == "torch.nn.modules.container.ModuleDict":
        state = node.state
    else:
        state = persistent(node, "Precond", "UNet", "Block", "MPConv", "MPFourier")
        if node.args[0]["class_name"] == "Block":
            blocks.append(state)
    if not isinstance(state, dict):
        raise ValueError(f"refused: the module at {prefix or 'the top'} has no state")
    for group in ("_parameters", "_buffers"):
        for name, value in _mapping(state.get(group)).items():
            if value is not None:
                tensors[f"{prefix}{name}"] = tensor(value)
    for name, child in _mapping(state.get("_modules")).items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", tensors, blocks, depth + 1)


def _mapping(value) -> dict:
    if isinstance(value, Node) and value.kind == "collections.OrderedDict":
        return value.items
    if isinstance(value, dict):
        return value
    raise ValueError("refused: a module without its dictionaries of tensors")


def model_of(options: dict) -> dict:
    """Return the config group `model` for the constructor arguments of the reference's network, defaults filled in."""
    model = {"family": "edm2", **DEFAULTS}
    known = {*DEFAULTS, *RENAMED.values(), "label_dim"}
    for key, value in options.items():
        name = RENAMED.get(key, key)
        if key in IGNORED:
            continue
        if name not in known:
            raise ValueError(f"refused: the network has an option {key!r} that is not known here")
        model[name] = plain(value)
    model["clip_act"] = model["clip_act"] or 0
    for key in ("resolution", "channels", "label_dim"):
        if type(model.get(key)) is not int:
            raise ValueError(f"refused: the network's {key} is {model.get(key)!r}, not an integer")
    return model


def _check_blocks(model: dict, blocks: list[dict]) -> None:
    """Raise ValueError where a block was built with other options than the network says."""
    for block in blocks:
        for key in ("dropout", "res_balance", "attn_balance", "clip_act"):
            if key in block and (block[key] or 0) != model[RENAMED.get(key, key)]:
                raise ValueError(f"refused: its blocks have {key}={block[key]!r}, its options say otherwise")


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: the reference interleaves q, k and v (row 3 (head channels + c) + {q, k, v}) and has 0-d gains


def is_qkv(name: str) -> bool:
    """Say whether a tensor of this name holds the rows of q, k and v, which the two layouts order differently."""
    return name.endswith(".attn_qkv.weight")


def from_reference(name: str, value: Tensor) -> Tensor:
    """Turn a tensor of the reference (or anything shaped like it, gradients, moments) into our layout."""
    if is_qkv(name):
        value = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    return value.reshape(1) if value.ndim == 0 else value


def to_reference(name: str, value: Tensor) -> Tensor:
    """Undo `from_reference`; the only tensors of shape [1] are gains."""
    if is_qkv(name):
        value = value.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
    return value.reshape(()) if name.endswith("gain") else value


def _check_tensors(model: dict, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless names and shapes are exactly those of the network that `model` describes."""
    if model["num_blocks"] * len(model["channel_mult"]) > len(tensors):
        raise ValueError(f"refused: {len(tensors)} tensors are too few for the network it describes")
    with torch.device("meta"):
        expected = build(model).state_dict()
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            raise ValueError(
                f"refused: tensor {name} is {'missing' if name in expected else 'not part of the network'}"
            )
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"refused: tensor {name} is {list(tensors[name].shape)}, the network wants {list(expected[name].shape)}"
            )
        if not tensors[name].is_floating_point():
            raise ValueError(f"refused: tensor {name} is {tensors[name].dtype}, not floating point")


def read_pickle(path) -> tuple[dict, dict[str, Tensor]]:
    """Return (snapshot header without checksums, tensors in our names and layout) of a published snapshot.

    Raise ValueError, in one line and with nothing executed, for any other file.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        root = read_nodes(data)
        content = root.items if isinstance(root, Node) and root.kind == "dnnlib.util.EasyDict" else root
        if not isinstance(content, dict) or "ema" not in content:
            raise ValueError(f"refused: a {type(root).__name__} without the entry 'ema' that a snapshot has")
        precond = persistent(content["ema"], "Precond")
        tensors, blocks = {}, []
        _collect(content["ema"], "", tensors, blocks)
        if precond.get("_init_args"):
            raise ValueError("refused: the network was built with unnamed arguments; its configuration cannot be known")
        model = model_of(_mapping(precond.get("_init_kwargs")))
        _check_blocks(model, blocks)
        tensors = {name: from_reference(name, value).contiguous() for name, value in tensors.items()}
        _check_tensors(model, tensors)
        data_facts = _data(content.get("encoder"), model)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        # besides our own refusals: fields of the wrong type, in a file made by hand
        raise ValueError(f"{path}: {error}; nothing in it was executed") from None
    clock, sigma_rel = from_name(path.name)
    header = {
        "format_version": FORMAT_VERSION,
        "kind": "import",
        "model": model,
        "activations": "fp16" if _mapping(precond.get("_init_kwargs")).get("use_fp16", True) else "fp32",
        "data": data_facts,
        "clock": clock,
        "sigma_rel": sigma_rel,
        "update_interval_images": 0,
        "run": "",
        "life": 0,
        "commit": "",
        "config_hash": "",
        "buffers": [name for name in tensors if name.endswith((".freqs", ".phases"))],
        "parent": f"{path.name} sha256:{hashlib.sha256(data).hexdigest()}",
        "dtype": {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(tensors["unet.out_gain"].dtype, "fp32"),
    }
    return header, tensors


def _data(encoder, model: dict) -> dict:
    """Return what the header says about the data; the encoder decides the codec and the whitening."""
    codec, moments, mean, std = "", "mean", [0.0] * model["channels"], [model["sigma_data"]] * model["channels"]
    if isinstance(encoder, Node) and encoder.args and isinstance(encoder.args[0], dict):
        name = encoder.args[0].get("class_name")
        if name in ENCODERS:
            codec, moments, mean, std = ENCODERS[name]
    if len(mean) != model["channels"]:
        raise ValueError(f"refused: encoder {codec} has {len(mean)} channels, the network {model['channels']}")
    stored = model["channels"] * (2 if moments == "mean_std" else 1)
    return {
        "codec": codec,
        "codec_hash": "",
        "moments": moments,
        "mean": list(mean),
        "std": list(std),
        "shape": [stored, model["resolution"], model["resolution"]],
        "label_dim": model["label_dim"],
        "digest": "",
    }


def from_name(name: str) -> tuple[int, float]:
    """Return clock and EMA length from "...-<kimg>-<std>.pkl" (the clock is a multiple of 1,024), zeros for other names."""
    match = re.search(r"-(\d{7})-(\d\.\d+)(?:\.[a-z]+)*\.pkl$", name)
    if not match:
        return 0, 0.0
    return math.ceil(int(match[1]) * 1000 / 1024) * 1024, float(match[2])


# ---------------------------------------------------------------------------------------------------------------------
# Writing, loading and the way back


def write(path, header: dict, tensors: dict[str, Tensor]) -> None:
    """Write a snapshot in one piece: under a temporary name, synced, then renamed."""
    checksums = {
        name: xxhash.xxh3_64_hexdigest(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, value in tensors.items()
    }
    _save(path, tensors, {"evenkeel": json.dumps({**header, "checksums": checksums})})


def _save(path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def export(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors under the reference's names and in its layout, as its state_dict has them."""
    return {name: to_reference(name, value).contiguous() for name, value in tensors.items()}


def export_file(source, target) -> None:
    """Write a snapshot of ours under the reference's names; the model's options go along as JSON metadata."""
    try:
        with safe_open(str(source), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("evenkeel", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{source}: no readable safetensors file ({error})") from None
    if not isinstance(header, dict) or not isinstance(header.get("model"), dict):
        raise ValueError(f"{source}: no header of evenkeel; give a snapshot or a reconstruction of a run")
    if header["model"].get("family", "edm2") != "edm2":
        raise ValueError(
            f"{source}: is a {header['model']['family']}; only networks of the family edm2 have NVIDIA's names"
        )
    names = {value: key for key, value in RENAMED.items()}
    options = {names.get(key, key): value for key, value in header["model"].items() if key not in ("family", "ode")}
    _save(target, export(tensors), {"edm2": json.dumps(options)})


def main(argv=None) -> int:
    """Convert a published EDM2 snapshot, or export one of ours."""
    parser = argparse.ArgumentParser(prog="python -m models.import_edm2", description=main.__doc__)
    parser.add_argument("source", type=Path, help="network-snapshot-*.pkl; with --export a .safetensors snapshot")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--export", action="store_true", help="from our snapshot to the reference's names and layout")
    options = parser.parse_args(argv)
    try:
        if options.export:
            export_file(options.source, options.target)
        else:
            megabytes = options.source.stat().st_size / 1e6
            if megabytes > 200:  # more than about 5 s
                print(f"reading {options.source} ({megabytes:.0f} MB)", file=sys.stderr)
            write(options.target, *read_pickle(options.source))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
