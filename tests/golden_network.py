"""Golden checks of the network: denoiser, loss, gradients, other configurations, a published snapshot."""

import hashlib
import re

import torch
from torch import Tensor
from torch.func import functional_call

from models import import_edm2, magnitude
from models.denoiser import Denoiser, build
from models.edm2 import Block
from tests.golden import (
    FIRST_STEP,
    GAIN_GRADIENT,
    GAIN_GRADIENT_OF_LARGEST,
    GAIN_GRADIENT_VARIANTS,
    NORM,
    OUTPUT,
    PROJECTION,
    WEIGHT_GRADIENT,
    Report,
    Vectors,
    distance,
    fingerprint_errors,
    in_use,
    network,
    reference_shapes,
    weights_by_rule,
)
from trainer.fragments import whole_fragments
from trainer.loss import denoising_loss
from trainer.optimizer import MagnitudeAdam

# ---------------------------------------------------------------------------------------------------------------------
# ga: the denoiser


def denoiser(file: Vectors, report: Report) -> None:
    """Compare D, u, F and what blocks return, in inference, in training, and with 16-bit activations."""
    raw = network(file.facts["config"], file.facts["weights_seed"])
    state = {name: import_edm2.to_reference(name, value) for name, value in raw.state_dict().items()}
    stored = file.under("state.")
    errors = {name: distance(state.get(name, torch.empty(0)), value) for name, value in stored.items()}
    report.worst(file.name, "state.* by weights_rule", errors, 0.0)
    report.equal(file.name, "number of parameters", sum(p.numel() for p in raw.parameters()), file.facts["num_params"])
    names = [name for name, _ in raw.named_parameters()]
    report.equal(file.name, "order of parameters", names, file.facts["param_order"])
    report.equal(file.name, "list of blocks", _block_list(raw), file.facts["block_list"])
    with torch.no_grad():
        _inference(file, report, in_use(raw))
        _sixteen_bits(file, report)
        forced = in_use(raw)
        got = {name: import_edm2.to_reference(name, p) for name, p in forced.named_parameters()}
        errors = {name: distance(got[name], value) for name, value in file.under("forced.").items()}
        report.worst(file.name, "forced.* (use_weights_)", errors, WEIGHT_GRADIENT)
        magnitude.normalize_rows_(raw)
        inputs = (file["x"], file["sigma"], file.tensors.get("class_labels"))
        d, logvar = raw(*inputs, return_logvar=True)
        note = "rows at the fixed point"
        report.close(file.name, "train.D", d, file["train.D"], OUTPUT, note)
        report.close(file.name, "train.logvar", logvar, file["train.logvar"], OUTPUT, note)
        report.close(file.name, "train.D_second_forward", d, file["train.D_second_forward"], OUTPUT, note)


def _inference(file: Vectors, report: Report, net: Denoiser) -> None:
    seen: dict[str, Tensor] = {}
    modules = dict(net.named_modules())

    def keep(name: str):
        def hook(module, inputs, output) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in file.facts["block_stats"]]
    x, sigma, labels = file["x"], file["sigma"], file.tensors.get("class_labels")
    d, logvar = net(x, sigma, labels, return_logvar=True)
    for handle in handles:
        handle.remove()
    report.close(file.name, "eval.D", d, file["eval.D"], OUTPUT)
    report.close(file.name, "eval.logvar", logvar, file["eval.logvar"], OUTPUT)
    norms, projections = fingerprint_errors(file.facts["block_stats"], seen)
    report.worst(file.name, "block_stats l2", norms, NORM)
    report.worst(file.name, "block_stats proj", projections, PROJECTION)
    for name, facts in file.facts["tensors"].items():
        if name.startswith("eval.inter."):
            module = re.search(r"(unet\.\S+?)\)?$", facts["about"])[1]
            report.close(file.name, name, seen[module], file[name], OUTPUT)
    scalar = float(re.search(r"sigma ([\d.]+)", file.facts["tensors"]["eval.D_scalar_sigma"]["about"])[1])
    d = net(x, torch.tensor(scalar), labels)
    report.close(file.name, "eval.D_scalar_sigma", d, file["eval.D_scalar_sigma"], OUTPUT)
    if labels is not None:
        d = net(x, sigma, labels.argmax(1))
        report.close(file.name, "eval.D, labels as integers", d, file["eval.D"], OUTPUT)
        report.close(file.name, "eval.D_nolabel", net(x, sigma), file["eval.D_nolabel"], OUTPUT)
        d = net(x, sigma, torch.full((len(x),), -1))
        report.close(file.name, "eval.D_nolabel, label -1", d, file["eval.D_nolabel"], OUTPUT)
        report.close(file.name, "eval.D_soft", net(x, sigma, file["soft_labels"]), file["eval.D_soft"], OUTPUT)
    d, logvar = net(x, file["sigma_extreme"], labels, return_logvar=True)
    report.close(file.name, "eval.D_extreme_sigma", d, file["eval.D_extreme_sigma"], OUTPUT)
    report.close(file.name, "eval.logvar_extreme", logvar, file["eval.logvar_extreme"], OUTPUT)
    report.close(file.name, "eval.F", _network_output(net, file), file["eval.F"], OUTPUT)


def _network_output(net: Denoiser, file: Vectors) -> Tensor:
    """Return F(c_in x; c_noise) of the golden input."""
    sigma = file["sigma"].reshape(-1, 1, 1, 1)
    c_in = 1 / (net.sigma_data**2 + sigma**2).sqrt()
    inputs, labels = (c_in * file["x"]).to(net.activations), file.tensors.get("class_labels")
    return net.unet(inputs, sigma.flatten().log() / 4, labels)[0].float()


def _sixteen_bits(file: Vectors, report: Report) -> None:
    net = in_use(network(file.facts["config"], file.facts["weights_seed"], "fp16"))
    error = (_network_output(net, file) - file["eval.F_fp16"]).abs().max().item()
    report.check(file.name, "eval.F_fp16 (absolute)", error, 4 * file.facts["fp16_vs_fp32_max_abs_F"])


def _block_list(net: Denoiser) -> list[dict]:
    return [
        {
            "name": name,
            "flavor": "enc" if block.encoder else "dec",
            "resample": block.resample.mode,
            "num_heads": block.num_heads,
            "cin": block.in_channels,
            "cout": block.out_channels,
        }
        for name, block in net.named_modules()
        if isinstance(block, Block)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# gb: loss and gradients


def forced_gradients(net: Denoiser, objective) -> dict[str, Tensor]:
    """Return the gradients of objective(denoiser) as the reference takes them, in its layout.

    The reference forces w <- w / (r + eps) first, and differentiates through a second normalisation of that.
    """
    net = in_use(net).train()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    rows = magnitude.normalized_parameters(net)
    used = {name: magnitude.normalize(leaf) if name in rows else leaf for name, leaf in leaves.items()}

    def call(*args, **kwargs):
        return functional_call(net, used, args, kwargs)

    call.sigma_data = net.sigma_data
    gradients = torch.autograd.grad(objective(call), list(leaves.values()))
    return {name: import_edm2.to_reference(name, g) for name, g in zip(leaves, gradients, strict=True)}


def gradient_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the errors of weights (of their maximum) and of gains (as a share of their bound of INDEX.json)."""
    gains = {name: value for name, value in want.items() if value.ndim == 0}
    largest = max((value.abs().item() for value in gains.values()), default=0.0)
    allowed = {n: GAIN_GRADIENT * v.abs().item() + GAIN_GRADIENT_OF_LARGEST * largest for n, v in gains.items()}
    of_gains = {name: (got[name] - value).abs().item() / allowed[name] for name, value in gains.items()}
    of_weights = {name: distance(got[name], value) for name, value in want.items() if name not in gains}
    return of_weights, of_gains


def gradients(file: Vectors, report: Report) -> None:
    """Compare the loss and the gradient of every parameter, the reference's way and through our optimizer."""
    raw = network(file.facts["config"], file.facts["weights_seed"])
    loss, images, labels = file.facts["loss"], file["images"], file.tensors.get("class_labels")
    sigma = torch.exp(file["rnd_normal"] * loss["P_std"] + loss["P_mean"])
    report.close(file.name, "sigma", sigma, file["sigma"], OUTPUT)
    num_samples = len(images)

    def objective(call) -> Tensor:
        sums, _ = denoising_loss(
            call, images, labels, sigma.flatten(), file["noise_unit"], sigma_data=loss["sigma_data"]
        )
        seen.append(sums.detach())
        return sums.sum() / num_samples

    seen: list[Tensor] = []
    want = file.under("grad.")
    of_weights, of_gains = gradient_errors(forced_gradients(raw, objective), want)
    report.close(file.name, "loss per sample", seen[0], file["loss"].sum(dim=(1, 2, 3)), OUTPUT)
    scalar = seen[0].double().sum().item() / num_samples
    report.check(file.name, "scalar", abs(scalar / file.facts["scalar"] - 1), OUTPUT)
    mean = seen[0].double().sum().item() / file["loss"].numel()
    report.check(file.name, "loss_mean", abs(mean / file.facts["loss_mean"] - 1), OUTPUT)
    report.worst(file.name, "gradients of weights", of_weights, WEIGHT_GRADIENT)
    report.worst(file.name, "gradients of gains, of their bound", of_gains, 1.0)

    magnitude.normalize_rows_(raw)
    adam = torch.optim.Adam(raw.parameters(), lr=0.0, fused=True)
    optimizer = MagnitudeAdam(adam, whole_fragments(raw), None)
    objective(raw).backward()
    optimizer.schedule(0.0, 1.0, num_samples, num_samples)
    adam.step()
    got = {name: import_edm2.to_reference(name, p.grad) for name, p in raw.named_parameters()}
    of_weights, of_gains = gradient_errors(got, want)
    # The reference's weights are forced once, RMS r / (r + eps), ours are at the fixed point 1 - eps: rows of its
    # gradient are longer by eps (1 / r - 1), a few 1e-4 for the rule's shortest rows. Only the first step has this.
    note = "first step: rows at the fixed point"
    report.worst(file.name, "gradients of weights, projected by the optimizer", of_weights, FIRST_STEP, note)
    report.worst(file.name, "gradients of gains, optimizer, of their bound", of_gains, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# gg: other configurations; gh: a full-size network; gi: a pickle


def variants(file: Vectors, report: Report) -> None:
    """Compare networks of other configurations: outputs, attention heads, gradients' fingerprints."""
    for variant, facts in file.facts["variants"].items():
        raw = network(facts["config"], facts["weights_seed"])
        got = file.under(f"{variant}.")
        inputs = (got["x"], got["sigma"], got.get("class_labels"))
        count = sum(p.numel() for p in raw.parameters())
        report.equal(file.name, f"{variant}: number of parameters", count, facts["num_params"])
        heads = {name: b.num_heads for name, b in raw.named_modules() if isinstance(b, Block) and b.num_heads}
        report.equal(file.name, f"{variant}: heads", heads, facts["heads"])
        with torch.no_grad():
            d, logvar = in_use(raw)(*inputs, return_logvar=True)
            report.close(file.name, f"{variant}: eval_D", d, got["eval_D"], OUTPUT)
            report.close(file.name, f"{variant}: eval_logvar", logvar, got["eval_logvar"], OUTPUT)

        def objective(call, inputs=inputs) -> Tensor:
            d, logvar = call(*inputs, return_logvar=True)
            return (d * inputs[0]).sum() + logvar.sum()

        gradient = forced_gradients(raw, objective)
        norms, projections = fingerprint_errors(facts["grad"], gradient)
        gains = {name for name, value in gradient.items() if value.ndim == 0}
        weights = {name: error for name, error in norms.items() if name not in gains}
        report.worst(file.name, f"{variant}: l2 of gradients of weights", weights, WEIGHT_GRADIENT)
        weights = {name: error for name, error in projections.items() if name not in gains}
        report.worst(file.name, f"{variant}: proj of gradients of weights", weights, PROJECTION)
        errors = {name: norms[name] for name in gains}
        report.worst(file.name, f"{variant}: gradients of gains", errors, GAIN_GRADIENT_VARIANTS)
        magnitude.normalize_rows_(raw)
        with torch.no_grad():
            report.close(file.name, f"{variant}: train_D", raw(*inputs), got["train_D"], OUTPUT)


def preset(file: Vectors, report: Report) -> None:
    """Compare one forward of a full-size network."""
    print(f"{file.name}: making the weights of a full-size network, about 10 s ...", flush=True)
    facts = file.facts
    model = import_edm2.model_of(facts["config"])
    listed = {name: shape for name, shape in reference_shapes(model).items() if name in facts["sha256_first_tensors"]}
    made = weights_by_rule(listed, facts["weights_seed"])
    hashes = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in made.items()}
    report.equal(file.name, "sha256 of the first tensors", hashes, facts["sha256_first_tensors"])
    net = network(facts["config"], facts["weights_seed"]).eval()
    report.equal(file.name, "number of parameters", sum(p.numel() for p in net.parameters()), facts["num_params"])
    magnitude.use_weights_(net)
    with torch.no_grad():
        d, logvar = net(file["x"], file["sigma"], file.tensors.get("class_index"), return_logvar=True)
    report.close(file.name, "eval_D", d, file["eval_D"], OUTPUT)
    report.close(file.name, "eval_logvar", logvar, file["eval_logvar"], OUTPUT)


def snapshot(file: Vectors, report: Report) -> None:
    """Import the pickle and compare its tensors, its configuration, the way back and the network's output."""
    path = file.path.parent / file.facts["pickle"]
    header, tensors = import_edm2.read_pickle(path)
    report.equal(file.name, "configuration", header["model"], import_edm2.model_of(file.facts["config"]))
    back = import_edm2.export(tensors)
    errors = {name: distance(back[name], value) for name, value in file.under("ema.").items()}
    report.worst(file.name, "listed entries", errors, 0.0)
    net = build(header["model"]).eval()
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    magnitude.use_weights_(net)
    for other in sorted(file.path.parent.glob("ga_*.json")):
        _against_fp32(Vectors(other), net, back, header, file, report)


def _against_fp32(full: Vectors, net: Denoiser, back: dict[str, Tensor], header: dict, file: Vectors, report: Report):
    """Compare an imported fp16 snapshot with the fp32 network that it was rounded from."""
    if import_edm2.model_of(full.facts["config"]) != header["model"]:
        return
    state = weights_by_rule(reference_shapes(header["model"]), full.facts["weights_seed"])
    errors = {name: distance(back[name], value.half()) for name, value in state.items()}
    report.worst(file.name, f"every entry against float16 of {full.name} state", errors, 0.0)
    with torch.no_grad():
        d = net(full["x"], full["sigma"], full.tensors.get("class_labels"))
    # fp16 storage: 2^-11 of each weight and of phases up to 20; 4x the listed effect of fp16 arithmetic
    bound = 4 * full.facts["fp16_vs_fp32_max_abs_F"]
    error = (d - full["eval.D"]).abs().max().item()
    report.check(file.name, "output of the imported network (absolute)", error, bound)
    rounded = {name: value.half().float() for name, value in state.items()}
    other = build(header["model"]).eval()
    other.load_state_dict({name: import_edm2.from_reference(name, value) for name, value in rounded.items()})
    magnitude.use_weights_(other)
    with torch.no_grad():
        want = other(full["x"], full["sigma"], full.tensors.get("class_labels"))
    report.close(file.name, "the same from the rounded state", d, want, 0.0)
