"""The training step without DeepSpeed, on one device: what its hooks are measured against, and what runs where it is not installed.

The same network, loss, optimizer and averages; no process group, no ZeRO, no checkpoints. For benchmarks alone: a run uses
trainer/engine.py.
"""

import torch

from models import prepared
from trainer import compilation
from trainer.config import Config
from trainer.ema import ShardedEma
from trainer.engine import device
from trainer.fragments import whole_fragments
from trainer.optimizer import MagnitudeAdam


class Bare:
    """Answers to what a benchmark asks of an Engine."""

    def __init__(self, config: Config, module: torch.nn.Module):
        self.config, self.device = config, device()
        self.module = self.denoiser = module.to(self.device)
        if config.engine.prepares:
            prepared.prepare_(self.module, self.module.activations)
        compilation.time_algorithms(config)
        o, on_gpu = config.optimizer, self.device.type == "cuda"
        fragments = whole_fragments(self.module)
        self.adam = torch.optim.Adam(self.module.parameters(), lr=0.0, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
        one_pass = on_gpu or config.engine.compile == "true"
        ema = ShardedEma(fragments, config.ema.sigma_rel)
        self.optimizer = MagnitudeAdam(self.adam, fragments, ema, o.nonfinite, one_pass=one_pass)
        if compilation.wanted(config, on_gpu):
            self.module.forward = compilation.compile_forward(self.module, config.engine.cuda_graphs)

    def backward(self, loss_sum: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch's summed loss."""
        loss_sum.backward()

    def step(self, learning_rate: float, clock_after: int) -> None:
        """Step, average and renormalise."""
        batch = self.config.global_batch
        self.optimizer.schedule(learning_rate, 1 / batch, clock_after, batch)
        self.adam.step()
        self.adam.zero_grad()
        prepared.refresh_(self.module)

    def time_collectives(self, on: bool) -> float:
        """Return 0: nothing is sent."""
        return 0.0

    def close(self) -> None:
        """Leave nothing behind."""
