"""Golden checks of training: trajectories of weights, averages and Adam's moments, through the optimizer of training.

The reference normalises weights in every forward, ours does it in the optimizer (trainer/optimizer.py gives the
argument). Two things differ on purpose: the reference's stored weights are "not yet renormalised" after a step, so ours
are caught between Adam and the renormalisation; and where a trajectory starts, the reference's first forward sees
weights of RMS r / (r + eps), ours rows at the fixed point 1 - eps. That leaves eps (1 / r - 1), a few 1e-4
of short rows, in what is *stored* in the first step and nothing of it in what the network computes: there, weights are
compared as they are used, after normalisation.
"""

import copy
import re

import numpy as np
import torch
from torch import Tensor

from models import import_edm2, magnitude
from tests.golden import (
    FIRST_STEP,
    GAIN_GRADIENT,
    NORM,
    OUTPUT,
    PROJECTION,
    TABLE,
    TRAINED,
    Report,
    Vectors,
    distance,
    fingerprint_errors,
    network,
)
from trainer.ema import ShardedEma
from trainer.ema_profiles import beta, gamma_from_sigma_rel
from trainer.fragments import whole_fragments
from trainer.loss import denoising_loss
from trainer.lr import learning_rate
from trainer.optimizer import MagnitudeAdam


class Trajectory:
    """A network, its optimizer and its averages, stepped as training does."""

    def __init__(self, facts: dict, stds: list[float], adam: dict):
        self.net = network(facts["config"], facts["weights_seed"]).train()
        magnitude.normalize_rows_(self.net)
        self.loss = facts["loss"]
        self.adam = torch.optim.Adam(self.net.parameters(), lr=0.0, fused=True, **adam)
        # Hooks run in the order of registration: this one sees the weights before they are renormalised.
        self.adam.register_step_post_hook(lambda *_: self._keep())
        self.fragments = whole_fragments(self.net)
        self.ema = ShardedEma(self.fragments, stds)
        self.optimizer = MagnitudeAdam(self.adam, self.fragments, self.ema, nonfinite="zero")
        self.weights: dict[str, Tensor] = {}

    def _keep(self) -> None:
        self.weights = self._named(p.detach().clone() for p in self.net.parameters())

    def _named(self, values) -> dict[str, Tensor]:
        names = [name for name, _ in self.net.named_parameters()]
        return {n: import_edm2.to_reference(n, value) for n, value in zip(names, values, strict=True)}

    def averages(self, index: int) -> dict[str, Tensor]:
        """Return one average in the reference's layout."""
        pairs = zip(self.ema.averages[index], self.fragments, strict=True)
        return self._named(flat.clone().view(fragment.shape) for flat, fragment in pairs)

    def moments(self, key: str) -> dict[str, Tensor]:
        """Return one of Adam's moments in the reference's layout."""
        return self._named(self.adam.state[p][key].clone() for p in self.net.parameters())

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients as they entered Adam."""
        return self._named(p.grad.clone() for p in self.net.parameters())

    def step(self, rounds: list[dict], rate: float, clock_after: int, batch: int) -> float:
        """Take one step over the rounds and return the loss, summed and divided by the batch."""
        self.adam.zero_grad()
        total = 0.0
        for r in rounds:
            sigma = torch.exp(r["rnd_normal"] * self.loss["P_std"] + self.loss["P_mean"]).flatten()
            sums, _ = denoising_loss(
                self.net, r["images"], r["labels"], sigma, r["noise"], sigma_data=self.loss["sigma_data"]
            )
            sums.sum().backward()
            total += sums.detach().double().sum().item()
        self.optimizer.schedule(rate, 1 / batch, clock_after, batch)
        self.adam.step()
        return total / batch

    def output(self, inputs: Vectors, weights: dict[str, Tensor]) -> Tensor:
        """Return D of the golden inputs with other weights, as used for inference."""
        net = copy.deepcopy(self.net).eval().requires_grad_(False)
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(import_edm2.from_reference(name, weights[name]))
            magnitude.use_weights_(net)
            return net(inputs["x"], inputs["sigma"], inputs.tensors.get("class_labels"))


def trajectory(file: Vectors, report: Report) -> None:
    """Run the steps of a file and compare everything that it records."""
    facts = file.facts
    batch = facts["batch_size"] if "batch_size" in facts else facts["train"]["batch_size"]
    stds = facts["stds"] if "stds" in facts else facts["train"]["stds"]
    schedule = facts["lr"] if "lr" in facts else facts["train"]["lr"]
    # the same optimizer in both kinds of file; only one of them states it
    options = facts.get("optimizer", {"betas": [0.9, 0.99], "eps": 1e-8})
    run = Trajectory(facts, stds, {"betas": tuple(options["betas"]), "eps": options["eps"]})
    for index, seed in enumerate(facts.get("ema_weights_seeds", [])):
        other = network(facts["config"], seed)
        for flat, value in zip(run.ema.averages[index], other.parameters(), strict=True):
            flat.copy_(value.detach().reshape(-1))
    for step in facts["steps"]:
        _step(file, report, run, step, batch, stds, schedule)
    _final(file, report, run, stds)


def _step(file: Vectors, report: Report, run: Trajectory, step: dict, batch: int, stds: list[float], schedule: dict):
    k, before, after = step["step"], step["nimg_before"], step["nimg_after"]
    what = f"step {k}:"
    decay, rampup = schedule["ref_batches"] * batch, schedule["rampup_Mimg"] * 1e6
    rate = learning_rate(before, schedule["ref_lr"], decay, rampup)
    report.check(file.name, f"{what} lr", abs(rate - step["lr"]) / max(step["lr"], 1e-30), TABLE)
    for std, want in zip(stds, step["betas"], strict=True):
        got = beta(after, after - before, gamma_from_sigma_rel(std))
        report.check(file.name, f"{what} beta {std:.3f}", abs(got - want) / max(want, 1e-30), TABLE)
    scalar = run.step(_rounds(file, k, report), rate, after, batch)
    report.check(file.name, f"{what} loss", abs(scalar / step["loss_scalar"] - 1), OUTPUT)

    first = k == file.facts["steps"][0]["step"]
    note = "first step: rows at the fixed point" if first else ""
    bound = FIRST_STEP if first else TRAINED
    if "grad_norm" in step:
        got = {name: value.double().norm().item() for name, value in run.gradients().items()}
        errors = {name: abs(got[name] / want - 1) for name, want in step["grad_norm"].items()}
        gains = {name: error for name, error in errors.items() if name.endswith("gain")}
        rest = {name: error for name, error in errors.items() if name not in gains}
        report.worst(file.name, f"{what} norms of gradients of weights", rest, bound, note)
        report.worst(file.name, f"{what} norms of gradients of gains", gains, GAIN_GRADIENT)
    recorded = [("weights", run.weights, step["weights"], f"step{k}.w.")]
    recorded += [
        (f"ema {std:.3f}", run.averages(i), step["emas"][f"{std:.3f}"], f"step{k}.ema{std:.3f}.")
        for i, std in enumerate(stds)
    ]
    for name, got, fingerprints, prefix in recorded:
        as_used = first and name == "weights"
        use = used if as_used else lambda value: value
        errors = {key: distance(use(got[key]), use(want)) for key, want in file.under(prefix).items()}
        tight = TRAINED if as_used else bound
        report.worst(file.name, f"{what} {name}{' as used' if as_used else ''}", errors, tight, "" if as_used else note)
        norms, projections = fingerprint_errors(fingerprints, got)
        report.worst(file.name, f"{what} {name}, l2 of all", norms, bound if first else NORM, note)
        report.worst(file.name, f"{what} {name}, proj of all", projections, bound if first else PROJECTION, note)


def used(value: Tensor) -> Tensor:
    """Return a stored weight as inference uses it; gains as they are."""
    return magnitude.normalize(value) if value.ndim > 1 else value


def _rounds(file: Vectors, k: int, report: Report) -> list[dict]:
    """Return the micro-batches of a step: stored in the file, or made by its `data_rule`."""
    if f"step{k}.images" in file:
        names = {"images": "images", "labels": "class_labels", "rnd_normal": "rnd_normal", "noise": "noise_unit"}
        return [{key: file.tensors.get(f"step{k}.{name}") for key, name in names.items()}]
    facts, config = file.facts, file.facts["config"]
    data_seed, scale, offset = re.search(
        r"RandomState\((\d+)\+2\*k\+rd\).*?\*([\d.]+)([+-][\d.]+)\)", facts["data_rule"]
    ).groups()
    num_classes = re.search(r"randint\((\d+)", facts["data_rule"])[1]
    noise_seed = re.search(r"manual_seed\((\d+)\+2\*k\+rd\)", facts["data_rule"])[1]
    size, shape = facts["round_batch"], (config["img_channels"], config["img_resolution"], config["img_resolution"])
    rounds = []
    for rd in range(facts["batch_size"] // size):
        rng = np.random.RandomState(int(data_seed) + 2 * k + rd)
        images = torch.from_numpy((rng.standard_normal((size, *shape)) * float(scale) + float(offset)).astype("f4"))
        classes = torch.from_numpy(rng.randint(int(num_classes), size=size))
        generator = torch.Generator().manual_seed(int(noise_seed) + 2 * k + rd)
        rnd_normal = torch.randn(size, 1, 1, 1, generator=generator)
        noise = torch.randn(size, *shape, generator=generator)
        prefix = f"step{k}.round{rd}"
        same = torch.equal(rnd_normal, file[f"{prefix}.rnd_normal"])
        same &= torch.equal(classes, file[f"{prefix}.class_index"])
        first = file[f"{prefix}.noise_first4"]
        same &= torch.equal(noise.flatten(1)[:, : first.shape[1]], first)
        report.equal(file.name, f"step {k}: draws of round {rd} by data_rule", bool(same), True)
        rounds.append({"images": images, "labels": classes, "rnd_normal": rnd_normal, "noise": noise})
    return rounds


def _final(file: Vectors, report: Report, run: Trajectory, stds: list[float]) -> None:
    last = {
        "final.w.": run.weights,
        "final.adam_m.": run.moments("exp_avg"),
        "final.adam_v.": run.moments("exp_avg_sq"),
    }
    for prefix, got in last.items():
        errors = {name: distance(got[name], want) for name, want in file.under(prefix).items()}
        note = "its gradients of the first step" if "adam" in prefix else ""
        report.worst(file.name, f"{prefix}*", errors, FIRST_STEP if "adam" in prefix else TRAINED, note)
    if "final.eval_D" not in file:
        return
    where = re.search(r"of (g\w+)", file.facts.get("eval_inputs", "of ga_precond"))[1]
    inputs = Vectors(file.path.parent / f"{where}.json")
    report.close(file.name, "final.eval_D", run.output(inputs, run.weights), file["final.eval_D"], TRAINED)
    for i, std in enumerate(stds):
        name = f"final.ema{std:.3f}_eval_D"
        report.close(file.name, name, run.output(inputs, run.averages(i)), file[name], TRAINED)
