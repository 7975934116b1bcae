"""Speed and memory of a small network's training step on a CPU: `python -m trainer.benchmark [--way eager,compiled,in-forward]`.

One process, one thread, synthetic latents, a real step: forward, backward, projection, Adam, two averages, renormalisation. The way
`in-forward` is the same network with the weight normalisation where EDM2's reference has it, twice in every forward, so that what
moving it saves is measured in the same run. Every way runs in a process of its own, so that peak memory is its own too.
"""

import argparse
import json
import resource
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from models.magnitude import MPConv, normalize
from trainer import child, flops
from trainer.compilation import compile_forward
from trainer.config import ROOT, to_dict
from trainer.ema import ShardedEma
from trainer.engine import build_denoiser
from trainer.fragments import whole_fragments
from trainer.groups import Model
from trainer.loss import denoising_loss
from trainer.optimizer import MagnitudeAdam

WAYS = ("eager", "compiled", "in-forward")
SIGMA_REL = (0.05, 0.10)
# the shape in which the reference was timed on a CPU: 0.81-0.85 s a step on an idle core, 19 % of it weight normalisation
SMALL = {"model_channels": 64, "resolution": 32, "channels": 4, "label_dim": 1000}
BATCH = 4
_CONVOLUTION = ("convolution", "aten::mm", "aten::addmm", "aten::linear")
_ATTENTION = ("scaled_dot_product", "flash_attention", "aten::bmm", "softmax")


class NormalisingConv(MPConv):
    """The layer as the reference computes it: weights forced and normalised in every training forward."""

    normalized = ()  # nothing left for the optimizer

    def forward(self, x, gain=None):
        """Apply the layer after overwriting the weight by its normalised self and normalising it again, differentiably."""
        with torch.no_grad():
            self.weight.copy_(normalize(self.weight))
        held, self.weight_of_forward = self.weight, normalize(self.weight)
        del self._parameters["weight"]
        self.weight = self.weight_of_forward
        try:
            return super().forward(x, gain)
        finally:
            del self.weight
            del self.weight_of_forward
            self._parameters["weight"] = held


class Step:
    """A training step that can be repeated and taken apart."""

    def __init__(self, model: Model, batch: int, way: str):
        torch.manual_seed(0)
        config = _config_of(model, batch)
        self.module, self.batch = build_denoiser(config), batch
        if way == "in-forward":
            for layer in self.module.modules():
                if type(layer) is MPConv:
                    layer.__class__ = NormalisingConv
        with torch.no_grad():  # gains are 0 at the start, and zeros would make the work easier than it is
            for p in self.module.parameters():
                if p.shape == (1,):
                    p.fill_(0.3)
        self.denoiser = self.module
        if way == "compiled":
            self.denoiser = compile_forward(self.module)
        self.fragments = whole_fragments(self.module)
        self.adam = torch.optim.Adam(self.module.parameters(), betas=(0.9, 0.99), fused=True)
        ema = ShardedEma(self.fragments, SIGMA_REL)
        self.optimizer = MagnitudeAdam(self.adam, self.fragments, ema, one_pass=way == "compiled")
        shape = (batch, model.channels, model.resolution, model.resolution)
        self.latents, self.noise = torch.randn(shape) * 0.5, torch.randn(shape)
        self.labels, self.sigma = torch.randint(model.label_dim, (batch,)), torch.rand(batch) + 0.2
        self.clock = 0

    def __call__(self) -> dict[str, float]:
        """Do one step; return the seconds of its parts."""
        marks = [time.perf_counter()]
        losses, _ = denoising_loss(self.denoiser, self.latents, self.labels, self.sigma, self.noise)
        marks.append(time.perf_counter())
        losses.sum().backward()
        marks.append(time.perf_counter())
        self.clock += self.batch
        self.optimizer.schedule(1e-4, 1 / self.batch, self.clock, self.batch)
        self.adam.step()
        self.adam.zero_grad()
        marks.append(time.perf_counter())
        return {name: b - a for name, a, b in zip(("forward", "backward", "optimizer"), marks, marks[1:], strict=False)}

    def weight_normalisation(self) -> float:
        """Return the seconds of projection and renormalisation alone: what is left of the weight normalisation."""
        for f in self.fragments:
            f.flat.grad = torch.zeros_like(f.flat)
        ema, self.optimizer.ema = self.optimizer.ema, None
        started = time.perf_counter()
        self.optimizer._before_adam()
        self.optimizer._after_adam()
        seconds = time.perf_counter() - started
        self.optimizer.ema = ema
        self.adam.zero_grad()
        return seconds

    def saved_bytes(self) -> int:
        """Return the bytes that autograd keeps between forward and backward, each storage once, without the parameters."""
        own = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses, _ = denoising_loss(self.module, self.latents, self.labels, self.sigma, self.noise)
        del losses
        return sum(kept.values())


def _config_of(model: Model, batch: int):
    from trainer.config import Config

    return Config(run="", duration_images=batch, global_batch=batch, micro_batch=batch, model=model)


def measure(way: str, steps: int) -> dict:
    """Return the figures of one way of training the small network, best of `steps` steps after two for warming up."""
    torch.set_num_threads(1)
    model = Model(**SMALL)
    step = Step(model, BATCH, way)
    before = _peak_bytes()
    for _ in range(2):
        step()
    peak = _peak_bytes()  # of a step, before the profiler takes memory of its own
    parts = min((step() for _ in range(steps)), key=lambda p: sum(p.values()))
    total = sum(parts.values())
    normalisation = 0.0 if way == "in-forward" else min(step.weight_normalisation() for _ in range(steps))
    shares = _shares(step) if way == "eager" else {}
    counted = flops.count(to_dict(_config_of(model, BATCH))["model"])
    return {
        "way": way,
        "step_seconds": total,
        "images_per_second": BATCH / total,
        "gflops_per_second": counted.training_flops_per_image * BATCH / total / 1e9,
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        "weight_normalisation_share": normalisation / total,
        **shares,
        "saved_for_backward_bytes": 0 if way == "compiled" else step.saved_bytes(),
        "peak_step_bytes": peak - before,
    }


def _shares(step: Step) -> dict:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    rows = profile.key_averages()
    total = sum(r.self_cpu_time_total for r in rows)

    def share(names):
        return sum(r.self_cpu_time_total for r in rows if any(n in r.key for n in names)) / total

    return {"convolution_share": share(_CONVOLUTION), "attention_share": share(_ATTENTION)}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _in_own_process(way: str, steps: int) -> dict:
    command = [sys.executable, "-m", "trainer.benchmark", "--way", way, "--steps", str(steps), "--json", "--here"]
    done = child.run(command, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)["training_step_cpu"][0]


def _table(results: list[dict]) -> Table:
    table = Table(
        title="training step, CPU, one thread, fp32: channels 64, latents [4, 4, 32, 32], 1000 classes, two averages",
        caption=f"torch {torch.__version__}; in-forward: weights normalised in every forward, as EDM2's reference does",
    )
    for column in ("way", "s/step", "images/s", "GFLOP/s", "forward", "backward", "optimizer", "weight norm.", "conv.", "attention",
                   "saved for backward", "peak of a step", "speed-up"):  # fmt: skip
        table.add_column(column, justify="left" if column == "way" else "right")
    slowest = next((r["step_seconds"] for r in results if r["way"] == "in-forward"), None)
    for r in results:
        percent = [f"{r[k]:.1%}" if r.get(k) else "" for k in ("convolution_share", "attention_share")]
        parts = [f"{r[f'{p}_seconds']:.3f}" for p in ("forward", "backward", "optimizer")]
        memory = [f"{r[k] / 2**20:.0f} MiB" if r[k] else "" for k in ("saved_for_backward_bytes", "peak_step_bytes")]
        norm = f"{r['weight_normalisation_share']:.1%}" if r["weight_normalisation_share"] else ""
        speed = f"{slowest / r['step_seconds']:.2f}x" if slowest else ""
        table.add_row(r["way"], f"{r['step_seconds']:.3f}", f"{r['images_per_second']:.2f}",
                      f"{r['gflops_per_second']:.1f}", *parts, norm, *percent, *memory, speed)  # fmt: skip
    return table


def run(options: argparse.Namespace) -> int:
    """Measure the ways that the options ask for and print them."""
    ways = options.way.split(",")
    if unknown := [w for w in ways if w not in WAYS]:
        raise ValueError(f"--way {unknown[0]}: must be one of {', '.join(WAYS)}")
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: must be at least 1")
    results = []
    for way in ways:
        with Console(stderr=True).status(f"measuring {way} ..."):
            results.append(measure(way, options.steps) if options.here else _in_own_process(way, options.steps))
    if options.json:
        print(json.dumps({"training_step_cpu": results, "torch": torch.__version__}))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(_table(results))
    return 0
