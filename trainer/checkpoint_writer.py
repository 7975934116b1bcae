"""The background service that makes checkpoints durable while training goes on.

`save` copies this rank's state to host memory and returns; a thread per rank writes, and the threads agree over a gloo group of
their own that all have written before rank 0 renames the folder. One save is in flight at most. What must not break: a checkpoint
completes only after every snapshot up to its clock is durable, or a kill could lose one.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_pipeline.durable import sync_folder, write_atomically
from trainer.checkpoint import VERSION, abandoned, hash_file, is_readable, list_checkpoints, seal, state
from trainer.engine import Engine
from trainer.host_copies import copy_to_host
from trainer.state import MAY_PASS, tell

PATIENCE_SECONDS, RETRY_SECONDS = 60.0, 1.0  # with a disk that refuses a run's last checkpoint


class NotSaved(OSError):
    """A checkpoint that could not be written on one of the ranks, raised on all; `may_pass`: another try may fare better."""

    def __init__(self, message: str, may_pass: bool):
        super().__init__(message)
        self.may_pass = may_pass


class CheckpointWriter:
    """One per rank, called in the same order on every rank."""

    def __init__(
        self,
        run: Path,
        engine: Engine,
        group,
        snapshots,
        keep_last: int,
        keep_every_images: int = 0,
        header: dict | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.run, self.engine, self.group, self.snapshots = run, engine, group, snapshots
        self.header = header or {}  # of snapshots: which network this is
        self.check = check  # raises where this start of the run may save no more
        self.shapes = {name: list(p.shape) for name, p in engine.module.named_parameters()}
        self.keep_last, self.keep_every_images = keep_last, keep_every_images
        self.failures = 0  # saves that could not be written
        self.durable = -1  # clock of the newest checkpoint of this start that is on disk
        self._thread: threading.Thread | None = None
        if engine.rank == 0:
            for left in (run / "checkpoints").glob(".*"):  # of a life that was killed while it wrote or deleted
                with contextlib.suppress(
                    OSError
                ):  # a file server's own (.nfs...) goes when nobody has it open any more
                    left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
        self._error: BaseException | None = None

    def save(self, clock: int, life: int, extras: dict) -> None:
        """Begin to save the state of `clock`; waits for the copy to host memory and for a save still in flight.

        One copy of this rank's state is in host memory at a time: (12 + 4 averages) / ranks bytes a parameter (ZeRO stages 1 to 3).
        Raises NotSaved on every rank when the save before could not be written (a full disk); older checkpoints stay.
        """
        self.wait()
        owned = self.engine.owned()
        there = {f"{kind}/{name}": t for kind, name, _, t in state(self.engine, owned)}
        if self.engine.rank == 0:
            there |= {f"buffer/{n}": b for n, b in self.engine.buffers().items()}
        tensors = dict(zip(there, copy_to_host(list(there.values())), strict=True))
        pieces = [[f.name, f.start, f.master.numel()] for f in owned]
        manifest = {
            "version": VERSION,
            "clock": clock,
            "life": life,
            "world": self.engine.world,
            "zero_stage": self.engine.config.engine.zero_stage,
            "sigma_rel": self.engine.ema.sigma_rel,
            "adam_step": float(next(iter(self.engine.optimizer.adam.state.values()))["step"]),
            "extras": extras,
            "shapes": self.shapes,
            "header": self.header,
        }
        self._thread = threading.Thread(target=self._work, args=(manifest, tensors, pieces), name="checkpoint")
        self._thread.start()

    def save_durably(self, clock: int, life: int, extras: dict, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Save the state of `clock` and return when it is on disk: what a run ends with, for there is no save after it.

        A full disk is waited for; raises NotSaved on every rank where it stays full for `patience_seconds`.
        """
        until, told = time.monotonic() + patience_seconds, False
        while True:
            try:
                self.save(clock, life, extras)
                return self.wait()
            except NotSaved as error:
                # one rank decides for all: their clocks differ
                if not self._agree(error.may_pass and time.monotonic() < until)[0]:
                    raise
                if self.engine.rank == 0 and not told:
                    tell(f"warning: {error}; trying again for {patience_seconds:.0f} s")
                told = True
                time.sleep(RETRY_SECONDS)

    def wait(self) -> None:
        """Return when nothing is in flight; raise what the thread raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, manifest: dict, tensors: dict[str, torch.Tensor], pieces: list) -> None:
        try:
            self._write(manifest, tensors, pieces)
            self.durable = manifest["clock"]
        except BaseException as error:  # kept for the training thread: `wait` raises it there
            self.failures += 1
            self._error = error
        finally:
            tensors.clear()  # an error that is kept would keep them

    def _write(self, manifest: dict, tensors: dict[str, torch.Tensor], pieces: list) -> None:
        final = self.run / "checkpoints" / f"{manifest['clock']:010d}"
        beside = final.with_name(f".{final.name}.{manifest['life']}.writing")  # two lives must not share one
        # in rounds, and every rank votes in each: nobody may wait for a rank that failed
        self._all_did(manifest["clock"], self._make_folder, beside)
        try:
            files = self._all_did(manifest["clock"], self._write_rank_file, beside, tensors, pieces)
            self._all_did(manifest["clock"], self._commit, beside, final, manifest, files)
        except OSError:
            if self.engine.rank == 0:
                shutil.rmtree(beside, ignore_errors=True)
            raise

    def _all_did(self, clock: int, what, *args) -> list:
        """Do `what` here and return what it returned on each rank; raise NotSaved everywhere if it could not be done on one."""
        problem, result = None, None
        try:
            result = what(*args)
        except Exception as error:  # told to all ranks by the vote
            problem = (f"rank {self.engine.rank}: {error}", _number(error) in MAY_PASS)
        answers = self._agree((problem, result))
        if problems := [p for p, _ in answers if p]:
            message = f"checkpoint at {clock} images not saved: {problems[0][0]}; those before it are intact"
            raise NotSaved(message, may_pass=all(passes for _, passes in problems))
        return [r for _, r in answers]

    def _commit(self, beside: Path, final: Path, manifest: dict, files: list[dict]) -> None:
        if self.engine.rank != 0:
            return
        self.check()
        manifest["files"] = {name: entry for part in files for name, entry in part.items()}
        write_atomically(beside / "manifest.json", json.dumps(seal(manifest), indent=1).encode())
        # one of that clock is damaged or of an abandoned life, or it was told to have failed; it goes when the new one is there
        hidden = _hide(final) if final.exists() else None
        os.replace(beside, final)
        sync_folder(final.parent)
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        write_atomically(
            final.parent / "latest", f"{final.name}\n".encode()
        )  # before older ones go: it names none of them
        self._drop_old(manifest["clock"])

    def _make_folder(self, folder: Path) -> None:
        if self.engine.rank == 0:
            self.snapshots.wait_durable()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def _write_rank_file(self, folder: Path, tensors: dict[str, torch.Tensor], pieces: list) -> dict:
        path = folder / f"rank{self.engine.rank:05d}.safetensors"
        save_file(tensors, path)
        path.chmod(folder.stat().st_mode & 0o666)  # the library makes files that only the owner can read
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
        return {path.name: {"bytes": path.stat().st_size, "xxh3": hash_file(path), "pieces": pieces}}

    def _drop_old(self, clock: int) -> None:
        # what lies beyond the clock, or was gone back behind, was passed over as damaged: it must not count among the ones to keep
        found = list_checkpoints(self.run)
        lost = abandoned(found)
        passed = sorted((p for p in found if int(p.name) <= clock), key=lambda p: int(p.name))
        kept = [p for p in passed if p not in lost and is_readable(p)][-self.keep_last :]
        for path in passed:
            for_good = self.keep_every_images and int(path.name) % self.keep_every_images == 0 and path not in lost
            # what can't be read may be readable again (a file server's trouble): it goes when it would have gone
            in_trouble = not is_readable(path) and int(path.name) > int(kept[0].name)
            if path not in kept and not for_good and not in_trouble:
                _discard(path)

    def _agree(self, mine) -> list:
        if self.group is None:
            return [mine]
        everyone = [None] * self.engine.world
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone


def _number(error: Exception) -> int | None:
    """Return an error's errno; the safetensors library tells it in words only."""
    words = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(words[1]) if words else None)


def _discard(folder: Path) -> None:
    """Remove a checkpoint; hidden first, so that none with a final name is ever half there."""
    try:
        shutil.rmtree(_hide(folder), ignore_errors=True)
    except OSError as error:  # an old checkpoint that stays costs disk space, nothing else
        tell(f"warning: {folder} stays: {error}")


def _hide(folder: Path) -> Path:
    hidden = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)  # of a removal that did not come to its end
    os.replace(folder, hidden)
    return hidden
