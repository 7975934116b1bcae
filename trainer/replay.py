"""Do steps of a run again and compare: `python -m trainer.replay RUN --at CLOCK`, under torchrun with as many ranks as the run had.

From the checkpoint before CLOCK, by the very code of training, in a temporary folder: the run directory is only read. Compared are
every line that the run logged on the way, and the checkpoint at CLOCK if there is one (--through: at the next one), tensor by
tensor. For bad nodes and silent corruption (which tensor), non-finite steps and loss spikes (which samples). Exit status: 0 all the
same, 1 something differs or is not finite, 2 the user's error.
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.command import command_line
from trainer import checkpoint, comparison, provenance, run_log, scratch, state
from trainer.config import Config, digest, load, parse_size
from trainer.run import Run
from trainer.stop import Stop
from trainer.train import step

LARGEST = 3  # losses that are shown of the step to CLOCK
LOOSE = "another number of ranks or ZeRO stage, or a GPU without engine.deterministic"
NAMED = 8  # samples of a non-finite step


class Replay(Run):
    """Steps that are done again, in a folder of their own; `original` is the run's."""

    told = False  # what a run says at its start is of no interest here

    def __init__(self, config: Config, scratch: Path, original: Path, at: int, through: bool):
        super().__init__(config, scratch, Stop())
        self.original, self.at, self.told = original, at, True
        self.base, self.logged_at = self.clock, self.clock
        self.lines = run_log.lineage(run_log.read(original))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # positions and losses of the step under way
        self.findings = 0
        self.until = self._end(through)
        manifest = self._manifest(self.base)
        where = f"from the checkpoint at {self.base}" if self.base else "from the beginning"
        self.say(f"{original}: {where} to {self.until} images on {self.world} ranks")
        self._say_what_is_not_the_same(manifest)

    def say(self, line: str) -> None:
        if self.told or line.startswith("damaged"):
            super().say(line)

    def _manifest(self, clock: int) -> dict | None:
        """Return the manifest of the run's whole checkpoint at a clock, None without one."""
        path = self.original / "checkpoints" / f"{clock:010d}"
        return json.loads((path / "manifest.json").read_text()) if (path / "manifest.json").is_file() else None

    def _end(self, through: bool) -> int:
        """Return where to stop: the first clock from --at on that has something to compare with; the same on every rank."""
        batch = self.config.global_batch
        if self.at <= self.base or (self.at - self.base) % batch:
            near = self.base + max(1, round((self.at - self.base) / batch)) * batch
            raise ValueError(f"--at {self.at}: no step of {batch} images from {self.base} on ends there; try {near}")
        saved = [int(p.name) for p in checkpoint.list_checkpoints(self.original)]
        logged = [] if through else [int(line["evenkeel_images_seen"]) for line in self.lines]
        ahead = [clock for clock in saved + logged if clock >= self.at and (clock - self.base) % batch == 0]
        if through and not ahead:
            raise ValueError(f"--through: no checkpoint at {self.at} images or later in {self.original}; leave it out")
        shared = [min(ahead, default=self.at)]
        dist.broadcast_object_list(shared)  # the run may be under way: ranks may have looked at different times
        return shared[0]

    def _exact(self, world: int, stage: int) -> bool:
        same_bits = self.engine.device.type == "cpu" or self.config.engine.deterministic
        return same_bits and (world, stage) == (self.world, self.config.engine.zero_stage)

    def _say_what_is_not_the_same(self, manifest: dict | None) -> None:
        header = (manifest or {}).get("header", {})
        here = {"commit": provenance.commit(), "config_hash": header.get("config_hash") and digest(load(self.original))}
        for key, mine in here.items():
            if header.get(key) and mine and header[key] != mine:
                self.say(f"note: {key} was {header[key]}, here it is {mine}: a difference may come from that")

    # -----------------------------------------------------------------------------------------------------------------
    # Steps.

    def forward_backward(self, positions, upcoming) -> None:
        """As in training; the losses of the step are kept."""
        super().forward_backward(positions, upcoming)
        self.seen.append(self.meter.recent[-1])

    def go(self) -> int:
        """Do the steps again; return the exit status."""
        while self.clock < self.until:
            self.seen.clear()
            bad_before = float(self.engine.optimizer.num_nonfinite)
            published = step(self)
            if self.clock == self.at:
                self._show_losses()
            if float(self.engine.optimizer.num_nonfinite) > bad_before and self._name_the_nonfinite():
                break
            if published:
                self._compare_line()
            if self.due(self.config.checkpoints.every_images):
                self._extras()  # a save makes all ranks share what each has learned of bad samples
        if self.clock == self.until and (manifest := self._manifest(self.clock)):
            self._compare_tensors(manifest)
        self.say(
            f"state at {self.clock} images: {comparison.digest(self.engine)} (the same on every sound machine of this kind)"
        )
        everyone = [None] * self.world
        dist.all_gather_object(everyone, self.findings)  # lines are compared on rank 0 alone
        found = max(everyone)
        self.say(f"{found} finding{'s' * (found > 1)}" if found else "all the same")
        return 1 if found else 0

    def _losses(self) -> list[tuple[float, int]]:
        """Return (loss per element, position) of the step's samples on all ranks; collective."""
        mine = [
            (float(v), int(p))
            for where, loss in self.seen
            for p, v in zip(where, loss / self.meter.elements, strict=True)
        ]
        everyone = [None] * self.world
        dist.all_gather_object(everyone, mine)
        return [pair for part in everyone for pair in part]

    def _describe(self, position: int) -> str:
        import numpy as np

        e = self.examples.at(np.array([position]))
        source = self.examples.source
        name = source.name(position) if hasattr(source, "name") else "sample"  # the stock readers know no keys
        finite = "" if bool(torch.isfinite(e.latents).all()) else ", what is stored of it is not finite"
        return f"{name} at position {position} (label {int(e.labels[0])}, sigma {float(e.sigma[0]):.4g}{finite})"

    def _show_losses(self) -> None:
        order = sorted(self._losses(), key=lambda pair: -pair[0] if math.isfinite(pair[0]) else -math.inf)
        mean = math.fsum(loss for loss, _ in order) / len(order)
        told = "; ".join(f"{loss:.4g}: {self._describe(p)}" for loss, p in order[:LARGEST])
        norm = float(self.engine.optimizer.gradient_norm)
        self.say(f"the step to {self.clock}: loss {mean:.6g}, gradient norm {norm:.6g}; largest {told}")

    def _name_the_nonfinite(self) -> bool:
        """Say which samples and which tensor make this step non-finite; return whether the policy ends the run here."""
        bad = sorted(position for loss, position in self._losses() if not math.isfinite(loss))
        optimizer, names = self.engine.optimizer, [None] * self.world
        weights = [f.name for f in self.engine.fragments if not bool(torch.isfinite(f.master).all())]
        dist.all_gather_object(names, (optimizer.bad_tensors(), weights))
        place = list(self.engine.shapes)
        gradients, weights = (sorted({n for one in names for n in one[i]}, key=place.index) for i in (0, 1))
        self.findings += 1
        self.say(
            f"the step to {self.clock} is not finite: first gradient {gradients[0]}, {len(gradients)} of {len(place)} tensors"
        )
        if weights:
            self.say(f"  weights were not finite before it: first {weights[0]}, {len(weights)} tensors")
        for position in bad[:NAMED]:
            self.say(f"  loss of {self._describe(position)}")
        self.say(f"  {len(bad)} samples in all" if bad else "  no sample's own loss was non-finite")
        return self.config.optimizer.nonfinite == "stop"

    # -----------------------------------------------------------------------------------------------------------------
    # Comparisons.

    def _compare_line(self) -> None:
        """Compare the line that was published just now with the one that the run logged at this clock; on rank 0."""
        begun, self.logged_at = self.logged_at, self.clock
        found = [i for i, line in enumerate(self.lines) if line["evenkeel_images_seen"] == self.clock]
        if self.rank != 0 or not found:
            return
        line, before = self.lines[found[0]], self.lines[found[0] - 1] if found[0] else {"attempt": 0}
        # sums since the last publication are comparable where both began at the same clock; a start's first began at its checkpoint
        same_start = before["attempt"] == line["attempt"]
        from_there = before["evenkeel_images_seen"] if same_start else line.get("evenkeel_checkpoint_clock_images")
        window = from_there == begun
        exact = self._exact(run_log.world(line), self.config.engine.zero_stage)
        names = (comparison.SINCE_PUBLICATION if window else ()) + (comparison.OF_A_MICRO_BATCH if exact else ())
        names += comparison.OF_THE_STEP
        different, count = comparison.values(line, run_log.read(self.folder)[-1], names, exact)
        self.findings += len(different)
        how = "bit by bit" if exact else f"within {comparison.TOLERANCE:g} ({LOOSE})"
        if different:
            self.say(
                f"at {self.clock}: {len(different)} of {count} logged values differ, compared {how}; first: {different[0]}"
            )
        else:
            self.say(f"at {self.clock}: {count} logged values agree, compared {how}")

    def _compare_tensors(self, manifest: dict) -> None:
        path = self.original / "checkpoints" / f"{self.clock:010d}"
        if problems := checkpoint.verify(path):
            self.findings += 1
            self.say(f"the checkpoint is damaged: {problems[0]}")
            return
        exact = self._exact(manifest["world"], manifest["zero_stage"])
        different, count, worst = comparison.tensors(path, manifest, self.engine, exact)
        self.findings += len(different)
        how = (
            "bit by bit"
            if exact
            else f"within {comparison.TOLERANCE:g} ({LOOSE}); the largest difference is {worst:.2g}"
        )
        if different:
            self.say(f"checkpoint at {self.clock}: {len(different)} of {count} tensors differ, compared {how}")
            self.say(f"first tensor that differs: {comparison.say(different[0])}")
        else:
            self.say(f"checkpoint at {self.clock}: {count} tensors agree, compared {how}")

    def leave(self) -> None:
        """Close everything; nothing is saved."""
        self.snapshots.close()
        self.metrics.close()
        self.watchdog.close()
        self.peers.close()
        self.engine.close()


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def check_reached(original: Path, config: Config, word: str, at: int) -> None:
    """Raise ValueError for a clock that the run has not come near: it may have failed before it logged its last steps."""
    known = [int(line["evenkeel_images_seen"]) for line in run_log.read(original)]
    known += [int(p.name) for p in checkpoint.list_checkpoints(original)] + [state.read(original).get("clock", 0)]
    if not config.global_batch <= at <= max(known) + config.metrics.every_images:
        raise ValueError(
            f"--at {word}: the run has done steps to {config.global_batch} ... {max(known)}; name one of them"
        )


@command_line("nothing was written", also=(FloatingPointError,))
def main(argv=None) -> int:
    """Do steps of a run again, and say what comes out otherwise."""
    parser = argparse.ArgumentParser(prog="python -m trainer.replay", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; it is only read")
    parser.add_argument(
        "--at", required=True, metavar="CLOCK", help="images seen after the step in question, such as 40Ki"
    )
    parser.add_argument(
        "--through", action="store_true", help="go on to the next checkpoint, and compare every tensor with it"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = None
    try:
        original, at = options.run.resolve(), parse_size(options.at)
        folder = scratch.folder_of(original, at)
        config = scratch.open_config(original, folder)
        check_reached(original, config, options.at, at)
        scratch.prepare(original, folder, at)
        if state.read(original).get("parent") and not any((folder / "checkpoints").iterdir()):
            raise ValueError(f"{original}: was forked, and has no checkpoint before {at} any more; replay a later step")
        replay = Replay(config, folder, original, at, options.through)
        status = replay.go()
        replay.leave()
        return status
    finally:
        if folder is not None:
            shutil.rmtree(folder.parent, ignore_errors=True)


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_status in (2, 130):
        os._exit(exit_status)  # a peer may be gone: the process group's destructors would wait for it or abort
    sys.exit(exit_status)
