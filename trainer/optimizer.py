"""Adam on magnitude-preserving shards: the weight normalisation that EDM2's reference does in every forward, done once per step.

For a row w of fan-in n with r = RMS(w), and g the gradient with respect to the stored weight as the plain forward sees it:

    before Adam   g <- (g - w <w, g> / (n r (r + eps))) / (r + eps)     the backward of w / (r + eps), exactly
    Adam          on the projected gradient
    averages      move towards the weights as Adam left them
    afterwards    w <- w / (r + eps)                                    forced weight normalisation (Karras et al. 2024, Eq. 66)

The masters live in ZeRO partitions, which cut through rows: the sums of a cut row are completed by one small all-reduce before and
one after Adam. Everything hangs on step hooks of a client torch.optim.Adam, so that DeepSpeed needs no patch. Only weights that a
layer marks are rows; a gain of shape [1] taken for a row would be forced to +-1.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from models.magnitude import EPS
from trainer.ema import ShardedEma
from trainer.fragments import Fragment, RowLayout
from trainer.one_pass import OnePass
from trainer.pages import empty_apart


class MagnitudeAdam:
    """Turn the step of a torch Adam into the magnitude-preserving step, by hooks.

    Call `schedule` before every `adam.step()`. `nonfinite` says what a non-finite gradient does: 'stop' and 'skip' mask Adam and
    the renormalisation on the device (the averages and the clock go on), 'zero' zeroes the entries as EDM2 does. The host learns of
    it through `nonfinite_steps`, one step later. `one_pass` does the same step in one pass over memory (one_pass.py), which leaves
    torch's own Adam nothing to do and the gradients as they were.
    """

    def __init__(
        self,
        adam: torch.optim.Adam,
        fragments: Sequence[Fragment],
        ema: ShardedEma | None,
        nonfinite: str = "stop",
        replicas: int = 1,
        one_pass: bool = False,
    ):
        self.adam, self.fragments, self.ema, self.nonfinite = adam, list(fragments), ema, nonfinite
        self.replicas = replicas  # how many ranks hold each fragment: their squares are summed as often
        self.layout = RowLayout.of(self.fragments)
        self.device = self.fragments[0].master.device
        self.gradient_norm = torch.zeros((), device=self.device)
        self.masked = torch.zeros((), device=self.device)  # 1 while a step is masked; sticky with 'stop'
        self.num_nonfinite = torch.zeros((), device=self.device)  # steps
        # 1 for each of this rank's fragments whose gradient was non-finite in the last bad step
        self.bad_fragments = torch.zeros(len(self.fragments), device=self.device)
        self._bad = self._hidden = self.bad_fragments
        self._known = torch.zeros((), pin_memory=self.device.type == "cuda")
        self._copied = torch.cuda.Event() if self.device.type == "cuda" else None
        self._gradient_scale, self._clock_after, self._batch = 1.0, 0, 0
        self._init_adam_state(one_pass)
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._one_pass = OnePass(self) if one_pass else None
        adam.register_step_pre_hook(lambda *_: self._before_adam())
        adam.register_step_post_hook(lambda *_: self._after_adam())

    def _init_adam_state(self, one_step: bool) -> None:
        # as Adam itself would on its first step; made here so that a checkpoint can be loaded into it before any step
        # (ZeRO stage 3 hands Adam its partition only while it steps: the fragments know it at all times)
        # the one pass counts its steps once, not for each of hundreds of tensors
        step = torch.zeros((), device=self.device)
        flats = [p for group in self.adam.param_groups for p in group["params"]] + [f.flat for f in self.fragments]
        for p in {id(p): p for p in flats}.values():
            self.adam.state[p] = {
                "step": step if one_step else step.clone(),
                "exp_avg": empty_apart(p, 1).zero_(),
                "exp_avg_sq": empty_apart(p, 2).zero_(),
            }

    def schedule(self, learning_rate: float, gradient_scale: float, clock_after: int, batch: int) -> None:
        """Set what the next step uses: learning rate, factor for the gradients, clock after the step and images of the step."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self._gradient_scale, self._clock_after, self._batch = gradient_scale, clock_after, batch

    @torch.no_grad()
    def hide_nonfinite(self, gradients: Sequence[Tensor]) -> None:
        """Note which fragments' `gradients` are non-finite and zero their bad entries, for a ZeRO stage that would drop the step.

        The policy stays the same: with 'stop' and 'skip' the coming step is masked.
        """
        self._hidden = (~torch.isfinite(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))).float()
        for g in gradients:
            g.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    @torch.no_grad()
    def _before_adam(self) -> None:
        grads = [f.grad for f in self.fragments]
        # a norm is finite where all entries are (and below 1e19): one cheap pass, where counting entries takes twenty times as long
        norms = torch.stack(torch._foreach_norm(grads)) if self._one_pass is None else self._one_pass.norms(grads)
        self._bad = torch.maximum((~torch.isfinite(norms)).float(), self._hidden)
        if self.nonfinite == "zero":
            for g in grads:
                g.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            norms = norms.nan_to_num(nan=0.0, posinf=0.0)
        shared = self._shared_sums(norms.square().sum())
        self.gradient_norm = (shared[-2] / self.replicas).sqrt() * self._gradient_scale
        bad = (shared[-1] > 0).float()
        # with 'stop', of the first bad step
        self.bad_fragments = torch.where(bad > self.masked, self._bad, self.bad_fragments)
        self.num_nonfinite = self.num_nonfinite + bad
        if self.nonfinite != "zero":
            self.masked = torch.maximum(self.masked, bad) if self.nonfinite == "stop" else bad
        cut = shared[: 2 * len(self.layout.cut_lengths)].view(2, -1)
        if self._one_pass is None:
            # the protocol of torch.amp.GradScaler: at 1, fused Adam leaves everything untouched
            self.adam.found_inf = self.masked
            self._project(cut)
        else:
            self._step_in_one_pass(grads, cut)

    def _step_in_one_pass(self, grads: list[Tensor], cut: Tensor) -> None:
        next(iter(self.adam.state.values()))["step"].add_(1 - self.masked)
        weights = [] if self.ema is None else self.ema.weights(self._clock_after, self._batch)
        self._one_pass(grads, cut, self.adam.param_groups[0]["lr"], self._gradient_scale, weights)
        # torch's Adam passes over what has no gradient; it gets them back when it is done
        self._taken = [(p, p.grad) for group in self.adam.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in self._taken:
            p.grad = None

    def _shared_sums(self, squares: Tensor) -> Tensor:
        """Return [<w,w> per cut row, <w,g> per cut row, sum of squared gradients, non-finite tensors], summed over ranks."""
        num = len(self.layout.cut_lengths)
        shared = torch.zeros(2 * num + 2, device=self.device)
        for piece in self.layout.pieces:
            w, g = piece.of(piece.fragment.master), piece.of(piece.fragment.grad)
            shared[piece.slot] = torch.dot(w, w)
            shared[num + piece.slot] = torch.dot(w, g)
        shared[-2], shared[-1] = squares, self._bad.sum()
        _sum_over_ranks(shared)
        return shared

    def _project(self, cut: Tensor) -> None:
        scale = self._gradient_scale
        for f in self.layout.plain:
            f.grad.mul_(scale)
        for rows in self.layout.whole:
            w, g, n = rows.of(rows.fragment.master), rows.of(rows.fragment.grad), rows.fragment.row_length
            r = torch.linalg.vector_norm(w, dim=1, keepdim=True) / math.sqrt(n)
            dot = (w * g).sum(1, keepdim=True)
            g.addcmul_(w, dot / _positive(n * r * (r + EPS)), value=-1.0).mul_(scale / (r + EPS))
        for piece in self.layout.pieces:
            w, g, n = piece.of(piece.fragment.master), piece.of(piece.fragment.grad), piece.fragment.row_length
            r = (cut[0, piece.slot] / n).sqrt()
            g.addcmul_(w, cut[1, piece.slot] / _positive(n * r * (r + EPS)), value=-1.0).mul_(scale / (r + EPS))

    @torch.no_grad()
    def _after_adam(self) -> None:
        if self._one_pass is None:
            if self.ema is not None:
                self.ema.update(self._clock_after, self._batch)
            for rows in self.layout.whole:
                w = rows.of(rows.fragment.master)
                r = torch.linalg.vector_norm(w, dim=1, keepdim=True) / math.sqrt(rows.fragment.row_length)
                w.mul_(self._unless_masked(1.0 / (r + EPS)))
        for p, grad in self._taken:
            p.grad = grad
        self._taken = []
        if not self.layout.cut_lengths:
            return
        squares = self._cut_squares()
        for piece in self.layout.pieces:
            r = (squares[piece.slot] / piece.fragment.row_length).sqrt()
            piece.of(piece.fragment.master).mul_(self._unless_masked(1.0 / (r + EPS)))

    def _cut_squares(self) -> Tensor:
        squares = torch.zeros(len(self.layout.cut_lengths), device=self.device)
        for piece in self.layout.pieces:
            w = piece.of(piece.fragment.master)
            squares[piece.slot] = torch.dot(w, w)
        _sum_over_ranks(squares)
        return squares

    def _unless_masked(self, factor: Tensor) -> Tensor:
        # times 1.0 is the identity, bitwise: a masked step leaves every weight as it was
        return torch.where(self.masked > 0, torch.ones_like(factor), factor)

    def nonfinite_steps(self) -> int:
        """Return how many steps were non-finite as of the previous call, the same on every rank; call it once per step.

        The count travels to the host while the next step runs, so that no step waits for the device.
        """
        if self._copied is not None:
            self._copied.synchronize()
        known = int(self._known)
        self._known.copy_(self.num_nonfinite, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return known

    def bad_tensors(self) -> list[str]:
        """Return this rank's tensors with a non-finite gradient in the last bad step; waits for the device."""
        return [f.name for f, bad in zip(self.fragments, self.bad_fragments.tolist(), strict=True) if bad]

    @torch.no_grad()
    def row_rms_deviation(self) -> Tensor:
        """Return the largest |RMS - (1 - eps)| over all rows of all ranks; collective, 0-d."""
        worst = torch.zeros((), device=self.device)
        for rows in self.layout.whole:
            r = torch.linalg.vector_norm(rows.of(rows.fragment.master), dim=1) / math.sqrt(rows.fragment.row_length)
            worst = torch.maximum(worst, (r - (1 - EPS)).abs().max())
        if self.layout.cut_lengths:
            lengths = torch.tensor(self.layout.cut_lengths, device=self.device)
            r = (self._cut_squares() / lengths).sqrt()
            worst = torch.maximum(worst, (r - (1 - EPS)).abs().max())
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst


def _positive(x: Tensor) -> Tensor:
    # an all-zero row has <w, g> = 0: any positive denominator gives the right 0
    return x.clamp_min(1e-30)


def _sum_over_ranks(tensor: Tensor) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
