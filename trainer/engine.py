"""The only file that knows DeepSpeed: process group, ZeRO engine, and where this rank's pieces of the fp32 masters lie.

Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), so that torchrun, Slurm and a
single process all work without DeepSpeed's launcher. Keep `gradient_clipping` written out: DeepSpeed 0.19.3 and later clip
at 1.0 unless told.
"""

import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from models import denoiser
from models.magnitude import normalize_rows_
from trainer.config import Config, check_batch, to_dict
from trainer.ema import ShardedEma
from trainer.optimizer import Fragment, MagnitudeAdam, row_length, whole_fragments

# how long a collective waits for a rank that is gone before it raises
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def on_gpu() -> bool:
    """Say whether every rank of this machine has a GPU of its own; else all compute on CPUs."""
    return torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start_process_group() -> tuple[int, int]:
    """Join the process group that the environment describes (a group of one without it) and return (rank, world)."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        assert os.environ["WORLD_SIZE"] == "1", "MASTER_PORT is not set although there are several ranks"
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu() else "cpu")
    # DeepSpeed 0.19 calls a torch name that newer torch calls by another one; nothing a user could do about it
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile one op at start-up on CPUs (25-45 s, and a crash where there is no compiler); gloo does the same work
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if on_gpu() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def device() -> torch.device:
    """Return where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def build_denoiser(config: Config) -> torch.nn.Module:
    """Build the network with weights that depend on the seed alone, rows at the fixed point of the forced normalisation."""
    torch.manual_seed(config.seed)
    module = denoiser.build(to_dict(config)["model"], config.engine.activations, config.engine.activation_checkpointing)
    normalize_rows_(module)
    return module.train()


class Engine:
    """A denoiser under ZeRO with the magnitude-preserving optimizer; `fragments` is the way to its masters.

    Micro-batch losses are given as per-sample sums; gradients are summed over samples, micro-batches and ranks and divided by the
    global batch once.
    """

    def __init__(self, config: Config, module: torch.nn.Module):
        import deepspeed

        self.config, self.rank, self.world = config, dist.get_rank(), dist.get_world_size()
        check_batch(config, self.world)
        self.micro_steps = config.global_batch // (self.world * config.micro_batch)
        self.device = device()
        self.module = module.to(self.device)
        o = config.optimizer
        adam = torch.optim.Adam(self.module.parameters(), lr=0.0, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
        self._deepspeed, *_ = deepspeed.initialize(model=self.module, optimizer=adam, config=self._deepspeed_config())
        self.fragments = self._find_fragments(adam)
        self._verify_layout()
        self.ema = ShardedEma(self.fragments, config.ema.sigma_rel)
        replicas = self.world if config.engine.zero_stage == 0 else 1
        self.optimizer = MagnitudeAdam(adam, self.fragments, self.ema, o.nonfinite, replicas)
        self.denoiser = torch.compile(self.module, fullgraph=True) if config.engine.compile else self.module

    def _deepspeed_config(self) -> dict:
        zero = {"stage": self.config.engine.zero_stage, "round_robin_gradients": False}
        if self.config.engine.zero_stage in (1, 2):
            zero["compute_grad_norm"] = False  # with it, DeepSpeed drops a step with a non-finite gradient in silence
        return {
            "train_micro_batch_size_per_gpu": self.config.micro_batch,
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": 0.0,
            "steps_per_print": 1_000_000_000,
            "zero_optimization": zero,
            "checkpoint": {"tag_validation": "Fail"},
        }

    def _find_fragments(self, adam: torch.optim.Adam) -> list[Fragment]:
        if self.config.engine.zero_stage == 0:
            return whole_fragments(self.module)
        flats = [p for group in adam.param_groups for p in group["params"]]
        rows, found = row_length(self.module), []
        for name, p in self.module.named_parameters():
            mapping = getattr(p, "_hp_mapping", None)  # None: no element of it lies on this rank
            if mapping is None:
                continue
            master, address = mapping.hp_fragment.detach().view(-1), mapping.lp_fragment_address
            assert master.dtype == torch.float32 and master.numel() == address.numel
            flat, offset = _locate(master, flats)
            found.append(Fragment(name, tuple(p.shape), address.start, master, rows[name], flat, offset))
        return found

    def owned(self) -> list[Fragment]:
        """Return the fragments that this rank writes to checkpoints and snapshots: together, every element once."""
        return self.fragments if self.config.engine.zero_stage or self.rank == 0 else []

    def _verify_layout(self) -> None:
        """Assert that the fragments of all ranks cover every element once and hold the module's values."""
        if self.config.engine.zero_stage == 0:
            return
        parameters = dict(self.module.named_parameters())
        for f in self.fragments:
            copy = parameters[f.name].detach().reshape(-1)[f.start : f.start + f.master.numel()]
            assert torch.equal(f.master.to(copy.dtype), copy), f"{f.name}: the master found is not this parameter's"
        mine = [(f.name, f.start, f.master.numel()) for f in self.fragments]
        everyone = [None] * self.world
        dist.all_gather_object(everyone, mine)
        for name, p in parameters.items():
            pieces = sorted((start, n) for part in everyone for other, start, n in part if other == name)
            ends = [0] + [start + n for start, n in pieces]
            starts = [start for start, _ in pieces] + [p.numel()]
            assert starts == ends, f"{name}: fragments {pieces} do not cover its {p.numel()} elements once"

    def backward(self, loss_sum: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch's summed loss."""
        self._deepspeed.backward(loss_sum, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-step, nothing more

    def step(self, learning_rate: float, clock_after: int) -> None:
        """Reduce the accumulated gradients, step, average and renormalise.

        DeepSpeed hands over the mean over ranks of summed gradients: times world / global_batch is the mean over samples.
        """
        batch = self.config.global_batch
        self.optimizer.schedule(learning_rate, self.world / batch, clock_after, batch)
        self._deepspeed.step()

    def refresh_copies(self) -> None:
        """Copy the masters into the module's parameters on every rank, after masters were loaded."""
        if self.config.engine.zero_stage == 0:
            return
        for name, p in self.module.named_parameters():
            whole = torch.zeros(p.numel(), dtype=torch.float32, device=self.device)
            for f in self.fragments:
                if f.name == name:
                    whole[f.start : f.start + f.master.numel()] = f.master
            dist.all_reduce(whole)  # every element is non-zero on one rank at most
            p.data.copy_(whole.view_as(p))

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers (Fourier frequencies and phases), the same on every rank."""
        return dict(self.module.named_buffers())

    def close(self) -> None:
        """Leave the process group; without it gloo may abort at exit."""
        self._deepspeed.destroy()
        dist.barrier()
        dist.destroy_process_group()


def _locate(view: torch.Tensor, flats: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Find the flat partition that `view` is part of, and where."""
    for flat in flats:
        offset = (view.data_ptr() - flat.data_ptr()) // flat.element_size()
        if offset >= 0 and offset + view.numel() <= flat.numel():
            return flat, offset
    raise AssertionError("a master fragment lies in none of the optimizer's partitions")
