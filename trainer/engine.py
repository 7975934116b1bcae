"""The only file that knows DeepSpeed: process group, ZeRO engine, and where this rank's pieces of the fp32 masters lie.

Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), so that torchrun, Slurm and a
single process all work without DeepSpeed's launcher. What must not break: nothing else imports it, and `fragments` is the only
way to the masters.
"""

import math
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from models import denoiser, prepared
from models.edm2 import Block
from models.magnitude import normalize_rows_
from trainer import compilation, zero
from trainer.config import Config, check_batch, to_dict
from trainer.ema import ShardedEma
from trainer.fragments import Fragment, row_length, whole_fragments
from trainer.optimizer import MagnitudeAdam
from trainer.peers import CONNECTING_SECONDS, connected_within, meet

# how long ranks wait at the start for the last of them, and a collective for one that neither comes nor dies
MEETING_SECONDS, COLLECTIVE_SECONDS = 600.0, 600.0


def on_gpu() -> bool:
    """Say whether every rank of this machine has a GPU of its own; else all compute on CPUs."""
    return torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start_process_group(
    meeting_seconds: float = MEETING_SECONDS, collective_seconds: float = COLLECTIVE_SECONDS, run: Path | None = None
) -> tuple[int, int]:
    """Join the process group that the environment describes (a group of one without it) and return (rank, world).

    Ends this rank where one dies while they connect; `run`'s state then says so.
    """
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        assert os.environ["WORLD_SIZE"] == "1", "MASTER_PORT is not set although there are several ranks"
        os.environ["MASTER_PORT"] = "0"  # any free one: nobody else needs to know
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu() else "cpu")
    # DeepSpeed 0.19 calls torch names that newer torch calls by others; nothing a user could do about it
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*deprecated", category=FutureWarning
    )
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile one op at start-up on CPUs (25-45 s, and a crash where there is no compiler); gloo does the same work
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if on_gpu() else "gloo"
    store, rank, world = meet(meeting_seconds)
    timeout = timedelta(seconds=collective_seconds)
    with connected_within(max(meeting_seconds, CONNECTING_SECONDS), run):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)  # adopts the group
    return dist.get_rank(), dist.get_world_size()


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
        compilation.time_algorithms(config)
        self.micro_steps = config.global_batch // (self.world * config.micro_batch)
        self.device = device()
        self.module = module.to(self.device)
        # before ZeRO may partition them: afterwards a parameter's own shape is (0,)
        self.shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        self.rows = row_length(self.module)
        self._prepare_for_stage()
        # ZeRO casts the module before it copies the masters from it: kept here, the masters start exact and their rows normalised
        exact = {n: p.detach().to("cpu", copy=True) for n, p in self.module.named_parameters()} if self._casts else {}
        o = config.optimizer
        adam = torch.optim.Adam(self.module.parameters(), lr=0.0, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
        settings = zero.settings(config, self.num_parameters(), self.micro_steps, on_gpu() and self.world > 1)
        self._deepspeed, *_ = deepspeed.initialize(model=self.module, optimizer=adam, config=settings)
        self.fragments = self._find_fragments(adam)
        if config.engine.zero_stage:
            zero.check_values(self.fragments, self.module, config.engine.zero_stage)
            zero.check_coverage(self.fragments, self.shapes)
        for f in self.fragments if exact else []:
            f.master.copy_(exact[f.name].view(-1)[f.start : f.start + f.master.numel()])
        del exact
        self.ema = ShardedEma(self.fragments, config.ema.sigma_rel)
        if config.engine.prepares:
            prepared.prepare_(self.module, self.module.activations)
        replicas = self.world if config.engine.zero_stage == 0 else 1
        # on a CPU the pass is C++, which wants a compiler as the compiled network does
        auto = on_gpu() or config.engine.compile == "true"
        one_pass = auto if o.one_pass == "auto" else o.one_pass == "true"
        self.optimizer = MagnitudeAdam(adam, self.fragments, self.ema, o.nonfinite, replicas, one_pass)
        # DeepSpeed's own call, not the module's: it is what tells a ZeRO stage where a micro-batch begins
        self.denoiser = self._deepspeed
        if compilation.wanted(config, on_gpu()):
            self._compile()

    @property
    def _casts(self) -> bool:
        return self.config.engine.weights != "fp32"

    def _prepare_for_stage(self) -> None:
        """Let stage 3 gather the weights of a block together: fewer, larger messages, and no hook inside of a compiled block."""
        if self.config.engine.zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(self.module, [Block], raise_if_not_found=False)  # EDM2's; others gather by layer

    def _compile(self) -> None:
        """Compile the forward of the network, or of each block where stage 3 gathers weights between blocks.

        The hooks of DeepSpeed stay outside: what is compiled is one graph, or an error.
        """
        parts = [self.module]
        if self.config.engine.zero_stage == 3:
            parts = [m for m in self.module.modules() if isinstance(m, Block)]
            # they share one code object, of which torch would compile eight variants and no more
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(parts))
        for part in parts:
            part.forward = compilation.compile_forward(part, self.config.engine.cuda_graphs)

    def _find_fragments(self, adam: torch.optim.Adam) -> list[Fragment]:
        if self.config.engine.zero_stage == 0:
            return whole_fragments(self.module)
        if self.config.engine.zero_stage == 3:
            return self._find_partitioned()
        flats = [p for group in adam.param_groups for p in group["params"]]
        found = []
        for name, p in self.module.named_parameters():
            mapping = getattr(p, "_hp_mapping", None)  # None: no element of it lies on this rank
            if mapping is None:
                continue
            master, address = mapping.hp_fragment.detach().view(-1), mapping.lp_fragment_address
            assert master.dtype == torch.float32 and master.numel() == address.numel
            flat, offset = _locate(master, flats)
            found.append(Fragment(name, self.shapes[name], address.start, master, self.rows[name], flat, offset))
        return found

    def _find_partitioned(self) -> list[Fragment]:
        """Return the fragments of stage 3: of every tensor the `rank`-th of `world` equal parts, the last ones padded."""
        from deepspeed.utils import safe_get_local_fp32_param

        flats, found = self._deepspeed.optimizer.fp32_partitioned_groups_flat, []
        for name, p in self.module.named_parameters():
            part = p.ds_tensor.ds_numel
            start = self.rank * part
            count = min(part, p.ds_numel - start)
            if count > 0:
                master = safe_get_local_fp32_param(p).detach().view(-1)[:count]
                flat, offset = _locate(master, flats)
                found.append(Fragment(name, self.shapes[name], start, master, self.rows[name], flat, offset))
        return found

    def owned(self) -> list[Fragment]:
        """Return the fragments that this rank writes to checkpoints and snapshots: together, every element once."""
        return self.fragments if self.config.engine.zero_stage or self.rank == 0 else []

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
        if self.config.engine.zero_stage == 3:
            from deepspeed.utils import safe_get_local_grad

            # this stage drops a step with a non-finite gradient in silence: the optimizer's own policy must see it first
            parameters = dict(self.module.named_parameters())
            self.optimizer.hide_nonfinite([safe_get_local_grad(parameters[f.name]) for f in self.fragments])
        self._deepspeed.step()
        prepared.refresh_(self.module)

    def refresh_copies(self) -> None:
        """Copy the masters into the module's parameters on every rank, and what is made of these, after masters were loaded."""
        if self.config.engine.zero_stage == 3:
            self._refresh_partitions()
        elif self.config.engine.zero_stage:
            for name, p in self.module.named_parameters():
                p.data.copy_(self._gather(name))
        prepared.refresh_(self.module)

    def _refresh_partitions(self) -> None:
        parameters = dict(self.module.named_parameters())
        for f in self.fragments:
            parameters[f.name].ds_tensor[: f.master.numel()].copy_(f.master)
        if kept := self._deepspeed.optimizer.persistent_parameters:  # small ones that are whole on every rank
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _gather(self, name: str) -> torch.Tensor:
        """Return the whole fp32 master of one parameter on every rank; collective."""
        whole = torch.zeros(math.prod(self.shapes[name]), dtype=torch.float32, device=self.device)
        for f in self.fragments:
            if f.name == name:
                whole[f.start : f.start + f.master.numel()] = f.master
        if self.config.engine.zero_stage:
            dist.all_reduce(whole)  # every element is non-zero on one rank at most
        return whole.view(self.shapes[name])

    def weights(self) -> dict[str, torch.Tensor]:
        """Return every fp32 master, whole, on every rank; collective, and as large as the network."""
        return {name: self._gather(name) for name in self.shapes}

    def num_parameters(self) -> int:
        """Count the network's parameters, all ranks together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def held_bytes(self) -> dict[str, int]:
        """Return what this rank holds between steps, by kind: the forward's weights, masters, Adam's moments, averages."""
        partitioned = self.config.engine.zero_stage == 3
        weights = prepared.num_bytes(self.module)
        for p in self.module.parameters():
            weights += p.numel() * p.element_size()  # at stage 3 only what stays whole on every rank
            weights += p.ds_tensor.numel() * p.ds_tensor.element_size() if partitioned else 0
        flats = {id(f.flat): f.flat for f in self.fragments}.values() if self.config.engine.zero_stage else ()
        moments = [m for state in self.optimizer.adam.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
        return {
            "weights": weights,
            "masters": sum(flat.numel() * flat.element_size() for flat in flats),
            "moments": sum(m.numel() * m.element_size() for m in moments),
            "averages": self.ema.num_bytes(),
        }

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers that are state (Fourier frequencies and phases), the same on every rank."""
        return {n: t for n, t in self.module.state_dict().items() if n not in self.shapes}

    def time_collectives(self, on: bool) -> float:
        """Switch DeepSpeed's timing of its collectives on or off; return the seconds that it has seen.

        While it is on, each collective waits for the device: for one step in many.
        """
        from deepspeed.comm.comm import comms_logger, timers

        comms_logger.enabled = comms_logger.prof_all = on
        comms_logger.verbose = False
        # not the latencies of its log: a timer that is never reset makes each of them the sum of all before
        milliseconds = sum(timers(name).elapsed(reset=True) for name in comms_logger.comms_dict)
        comms_logger.comms_dict.clear()
        return milliseconds / 1000

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
