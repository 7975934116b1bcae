"""A run: everything that training is made of, built and restored in order, and what a step asks of it.

The loop itself is in trainer/train.py. What must not break: every rank builds, restores, snapshots, saves and ends in the same
order, because each of these is collective.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from trainer import checkpoint, compilation, flops, origin, provenance
from trainer.audit import Audit
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import Config, digest, to_dict
from trainer.determinism import fix_environment
from trainer.engine import (
    COLLECTIVE_SECONDS,
    MEETING_SECONDS,
    Engine,
    build_denoiser,
    device,
    on_gpu,
    start_process_group,
)
from trainer.examples import Examples
from trainer.loss import denoising_loss
from trainer.meter import Meter
from trainer.metrics import Metrics
from trainer.peers import CONNECTING_SECONDS, FOREVER, Peers, connected_within
from trainer.snapshot_writer import SnapshotWriter
from trainer.state import RunState, await_predecessor, tell
from trainer.stop import Stop
from trainer.trackers import open_trackers
from trainer.watchdog import PATIENCE_FACTOR, Watchdog


class Run:
    """One start of a run, on one rank."""

    def __init__(self, config: Config, folder: Path, stop: Stop):
        self.config, self.folder, self.stop = config, folder, stop
        if config.engine.deterministic:
            fix_environment(folder, int(os.environ.get("RANK", "0")))
        if compilation.wanted(config, on_gpu()):
            compilation.keep_cache(folder, int(os.environ.get("RANK", "0")))
        self._meet()
        try:
            self._prepare()
        except RuntimeError as error:  # a collective's own, maybe
            raise self.peers.gone() or error from None

    def _prepare(self) -> None:
        """Build everything and restore what was saved."""
        config = self.config
        self._agree_on_attempt()
        self.examples = Examples(config, device())
        loss = config.loss
        self.weighting = {"weighting": loss.weighting, "prediction": config.model.prediction}
        self.weighting |= {"gamma": loss.gamma, "k": loss.p2_k}
        found = self._checkpoint()
        module = build_denoiser(config)
        if found is None:
            self.origin = origin.begin(config, module, self.examples.manifest, self.say)
        else:
            self.origin = checkpoint.origin_of(found)
        self.engine = Engine(config, module)
        held = ", ".join(f"{kind} {n / 2**20:.1f} MiB" for kind, n in self.engine.held_bytes().items())
        self.say(f"rank 0 of {self.world} holds, ZeRO stage {config.engine.zero_stage}: {held}")
        extras = self._restore(found)
        self._open_services(extras.get("metrics", {}))
        self._note_durable(self.clock)
        self.state.write(status="running", clock=self.clock)

    def _meet(self) -> None:
        """Find the other ranks; from the first collective on, somebody watches: on GPUs it would wait for a rank that is gone."""
        hang = self.config.engine.hang_seconds or MEETING_SECONDS
        self.patience = max(COLLECTIVE_SECONDS, 2 * PATIENCE_FACTOR * hang)
        # the watchdog speaks first: a collective's own timeout names nobody
        with self.stop.alone():
            self.rank, self.world = start_process_group(hang, self.patience, self.folder)
        with connected_within(max(hang, CONNECTING_SECONDS), self.folder):
            self.peers = Peers(self.folder, self.rank, self.world, self._group(FOREVER))

    def _agree_on_attempt(self) -> None:
        """Agree which start of the run this is, or that it must not be: rank 0 looks, all do as it says."""
        options, folder = self.config.engine, self.folder
        refusal = None
        if self.rank == 0:
            try:
                await_predecessor(folder)
            except ValueError as error:
                refusal = error
        shared = [refusal]
        dist.broadcast_object_list(shared)
        if shared[0] is not None:
            raise shared[0]
        self.state = RunState(folder, self.rank, self.config.duration_images)
        # rank 0 may have written before another rank read: one attempt, one last checkpoint
        shared = [self.state.values]
        dist.broadcast_object_list(shared)
        self.state.values = shared[0]
        self.state.write()
        attempt = self.peers.attempt = self.state.attempt
        self.watchdog = Watchdog(folder, self.rank, self.world, attempt, options.hang_seconds, options.hang_steps)
        self.say(f"attempt {attempt} of {folder} on {self.world} ranks, {device()}")

    def _checkpoint(self) -> Path | None:
        """Return what to continue from, None for a new run; raise ValueError where it should be there and is not."""
        found, known = checkpoint.choose(self.folder, self.say), self.state.values["last_checkpoint"]
        if found is None and known:
            raise ValueError(
                f"{self.folder / 'checkpoints'}: empty, but state.json tells of a checkpoint at {known} images; bring it back, or "
                f"move {self.folder} away to start anew"
            )
        if found is not None and known > int(found.name) and not (found.parent / f"{known:010d}").exists():
            self.say(
                f"warning: the checkpoint at {known} images, of which state.json tells, is gone; looking for the one before"
            )
        return found

    def _restore(self, found: Path | None) -> dict:
        """Load the checkpoint that was found, or begin at 0; return its extras, {} without one."""
        config = self.config
        self.clock, extras = checkpoint.restore(found, self.engine) if found else (0, {})
        bad = extras.get("nonfinite_steps", 0)
        self.engine.optimizer.num_nonfinite.fill_(bad)
        # steps of another policy, zeroed ones for instance, are none that this one forbids
        counted = extras.get("nonfinite", {"policy": "skip", "before": 0})  # an earlier version's: only skip counts on
        self.bad_before = counted["before"] if counted["policy"] == config.optimizer.nonfinite else bad
        self.examples.noise_levels.restore(extras.get("noise"), self.rank)
        if "quarantine" in extras:
            self.examples.source.load_state(extras["quarantine"])
        self.say(f"continuing at {self.clock} images" if self.clock else "starting at 0 images")
        over = max(0, config.duration_images - self.clock) % config.global_batch
        if over:  # the batch was another one before
            end, steps = config.duration_images + config.global_batch - over, f"steps of {config.global_batch} images"
            self.say(f"warning: {steps} from {self.clock} on end at {end}, beyond duration_images")
        self.resumed_at = self.clock
        self.state.values["last_checkpoint"] = self.clock  # a newer one may have been damaged
        return extras

    def _open_services(self, counted: dict) -> None:
        """Start what works beside the loop: votes on a stop, snapshots, checkpoints, metrics, which go on from `counted`."""
        config, folder, patience = self.config, self.folder, self.patience
        # one group for each thread that talks: votes, snapshots, checkpoints
        votes, snapshots, checkpoints = (self._group(timedelta(seconds=patience)) for _ in range(3))
        self.stop.vote_in(votes)
        commit = provenance.commit()
        header = provenance.header(config, self.examples.manifest, self.origin) | {
            "run": folder.name,
            "life": self.state.attempt,
            "life_start": self.clock,
            "commit": commit,
            "parent": self.state.values["parent"],
        }
        self.snapshots = SnapshotWriter(folder, header, self.rank, self.world, snapshots, patience)
        c = config.checkpoints
        self.checkpoints = CheckpointWriter(
            folder, self.engine, checkpoints, self.snapshots, c.keep_last, c.keep_every_images, header, self.state.check
        )
        self.audit = Audit(config.data.audit, self.state.attempt, self.rank, self.clock)
        m = config.metrics
        trackers = open_trackers(folder, m, self.clock, to_dict(config)) if self.rank == 0 else []
        self.metrics = Metrics(folder, self.rank, self.state.attempt, m.address, m.port, trackers)
        self.metrics.set("evenkeel_run_info", 1, commit=commit, config=digest(config), world=str(self.world))
        self.metrics.load_state(counted, self.world)
        cost = flops.count(to_dict(config)["model"])
        self.meter = Meter(config, self.engine, self.examples.source, self.metrics, self.clock, cost, self.bad_before)
        self.metrics.count("evenkeel_snapshots_written_total", 0)

    def _group(self, timeout: timedelta):
        return dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None

    def say(self, line: str) -> None:
        """Print a line to the log, from rank 0."""
        if self.rank == 0:
            tell(f"[{time.strftime('%H:%M:%S')}] {line}", sys.stdout)

    def due(self, every_images: int) -> bool:
        """Say whether the last step brought the clock to or past a multiple of `every_images`, or to the end."""
        before = self.clock - self.config.global_batch
        return every_images > 0 and (self.clock // every_images > before // every_images or self.ended())

    def ended(self) -> bool:
        return self.clock >= self.config.duration_images

    def phase(self, name: str, remark: str = ""):
        """Enter a part of the step: its time is measured, and the watchdog hears of it."""
        self.watchdog.alive(name + remark)
        return self.meter.phase(name)

    def forward_backward(self, positions, upcoming) -> None:
        """Accumulate the gradient of one micro-batch; the one after it is read meanwhile."""
        with self.phase("data"):
            e = self.examples.at(positions, upcoming)
        collect = self.meter.wants_magnitudes()
        remark = " with magnitudes" if collect else ""  # another graph: it is compiled on its own
        with self.phase("forward", remark):
            losses, parts = denoising_loss(
                self.engine.denoiser,
                e.latents,
                e.labels,
                e.sigma,
                e.noise,
                sigma_data=self.config.model.sigma_data,
                uncertainty=self.config.loss.uncertainty,
                weighting=self.weighting,
                label_dropout=self.config.loss.label_dropout,
                label_uniform=e.label_uniform,
                dropout_mask=self.examples.dropout_mask(e.positions),
                collect=collect,
            )
        self.metrics.set("evenkeel_last_forward_timestamp_seconds", time.time())
        with self.phase("backward", remark):
            self.engine.backward(losses.sum())
        self.examples.noise_levels.observe(parts)
        self.audit.record(self.clock, e.positions, losses)
        self.meter.losses(e.positions, losses, parts)

    def take_snapshots(self) -> None:
        """Hand copies of the averages to the snapshot service."""
        self.watchdog.alive("snapshot")
        started = time.perf_counter()
        for sigma_rel, average in zip(self.engine.ema.sigma_rel, self.engine.ema.averages, strict=True):
            pieces = self.snapshots.pieces(self.engine.owned(), average)
            self.snapshots.submit(self.clock, sigma_rel, pieces, self.engine.buffers())
        self._note_stall("snapshot", started)
        self.watchdog.alive("vote")

    def save(self) -> None:
        """Begin a checkpoint; the loop waits for the copy to host memory only. A full disk is reported, not fatal."""
        self.watchdog.alive("checkpoint")
        started = time.perf_counter()
        self.meter.check_finite()  # twice in a step: the second call knows this step
        extras = self._extras()
        try:
            self.checkpoints.save(self.clock, self.state.attempt, extras)
        except OSError as error:  # of the save before
            self.say(f"warning: {error}")
            self.checkpoints.save(self.clock, self.state.attempt, extras)
        self._note_stall("checkpoint", started)
        self.watchdog.alive("vote")

    def _note_stall(self, what: str, started: float) -> None:
        seconds = time.perf_counter() - started
        self.metrics.set(f"evenkeel_{what}_stall_seconds", seconds)
        self.meter.phases.host[what] += seconds

    def _extras(self) -> dict:
        """Return what truly is state besides the tensors: bad steps, what was counted, the union of the quarantines; collective."""
        extras = {"version": 1, "nonfinite_steps": int(self.engine.optimizer.num_nonfinite)}
        extras["nonfinite"] = {"policy": self.config.optimizer.nonfinite, "before": self.bad_before}
        self.meter.count_data()
        counted = [None] * self.world
        dist.all_gather_object(counted, self.metrics.state())
        extras["metrics"] = {"version": 1, "ranks": counted}
        if (noise := self.examples.noise_levels.extras()) is not None:
            extras["noise"] = noise
        if self.config.data.on_bad == "replace":
            everyone = [None] * self.world
            dist.all_gather_object(everyone, self.examples.source.state())
            shards, samples = ({bad for one in everyone for bad in one[key]} for key in ("shards", "samples"))
            extras["quarantine"] = {"version": 1, "shards": sorted(shards), "samples": sorted(samples)}
            self.examples.source.load_state(extras["quarantine"])  # as a resumed run does: this one goes on alike
        return extras

    def _note_durable(self, clock: int) -> None:
        manifest = self.folder / "checkpoints" / f"{clock:010d}" / "manifest.json"
        written = manifest.stat().st_mtime if manifest.is_file() else time.time()
        self.metrics.set("evenkeel_checkpoint_clock_images", clock)
        self.metrics.set("evenkeel_checkpoint_timestamp_seconds", written)
        self.noted_durable = clock

    def note_progress(self) -> None:
        """Tell others the clock and what is durable."""
        self.watchdog.alive("state")
        self.metrics.set("evenkeel_snapshot_queue_bytes", self.snapshots.queue_bytes)
        self.metrics.count("evenkeel_snapshot_write_failures_total", self.snapshots.retried)
        self.metrics.count("evenkeel_checkpoint_write_failures_total", self.checkpoints.failures)
        durable = max(self.checkpoints.durable, self.state.values["last_checkpoint"])
        if durable != self.noted_durable:
            self._note_durable(durable)
        self.metrics.count("evenkeel_snapshots_written_total", self.snapshots.written)
        self._tell_others(clock=self.clock, last_checkpoint=durable)
        self.watchdog.alive("vote")

    def _tell_others(self, **changes) -> None:
        try:
            self.state.write(**changes)
        except (
            OSError
        ) as error:  # of use to others only: neither a full disk nor a file server's trouble may stop the run
            self.say(f"warning: {self.state.path} is behind: {error}")

    def end(self, status: int) -> None:
        """Save, tell, and leave together: no rank goes before all are done saving."""
        self.meter.check_finite()
        self.watchdog.alive("last save")
        try:
            self.checkpoints.wait()
        except OSError as error:
            self.say(f"warning: {error}")
        if max(self.checkpoints.durable, self.resumed_at) != self.clock:
            # raises where the disk stays full: the status must not say that it was saved
            self.checkpoints.save_durably(self.clock, self.state.attempt, self._extras())
            self.say(f"saved a checkpoint at {self.clock} images")
        self.snapshots.close()
        self.stop.finish()
        self.note_progress()
        self._tell_others(status="finished" if self.ended() else "stopped")
        self.say("finished" if self.ended() else f"stopped at {self.clock} images, exit status {status}")
        self.metrics.close()
        self.watchdog.close()
        self.peers.close()
        self.engine.close()
