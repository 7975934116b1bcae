"""Train a denoiser: `python -m trainer.train CONFIG.yaml [key=value ...]`, one process per rank.

Ranks come from the environment (torchrun, Slurm or none). Exit status: 0 finished; 2 the user's error; 75 saved, start me
again; 130 saved after Ctrl-C; anything else is a crash. One clock: everything is a function of (seed, images seen).
"""

import sys

if __name__ == "__main__":
    if not __package__:
        sys.exit("error: run it as a module from the checkout: python -m trainer.train CONFIG.yaml")
    from trainer.stop import Stop  # itself free of torch

    STOP = Stop().listen()  # before the slow imports below: a signal during start-up is kept, not lost

import argparse
import os
import traceback
from pathlib import Path

import torch

from data_pipeline import durable
from trainer import state
from trainer.config import Config, differences, dump, load, to_dict
from trainer.examples import micro_batches
from trainer.lr import learning_rate
from trainer.peers import RankGone
from trainer.run import Run
from trainer.stop import Stop


def train(run: Run) -> int:
    """Tell the story of a run; return the exit status."""
    config = run.config
    run.stop.agreed()  # cast, and read at once: a stop asked for during start-up need not wait for a step, which may compile
    status = run.stop.agreed()
    while not run.ended() and not status:
        if step(run):
            run.note_progress()
        if run.due(config.snapshots.every_images):
            run.take_snapshots()
        if run.due(config.checkpoints.every_images):
            run.save()
        status = run.stop.agreed()
    status = 0 if run.ended() else status
    run.end(status)
    return status


def step(run: Run) -> bool:
    """Train on one global batch; say whether its metrics were published."""
    config = run.config
    rate = learning_rate(run.clock, config.lr.ref_lr, config.lr.decay_images, config.lr.rampup_images)
    for here, next_ in micro_batches(run.clock, config.global_batch, config.micro_batch, run.rank, run.world):
        run.forward_backward(here, next_)
    run.clock += config.global_batch
    with run.phase("optimizer"):
        run.engine.step(rate, run.clock)
    run.meter.check_finite()
    run.examples.noise_levels.step(run.clock)
    return run.meter.step(run.clock, rate)


def main(argv: list[str] | None = None, stop: Stop | None = None) -> int:
    """Parse the command line, train, and turn what happens into the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file of configs/, or a run directory's config.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_args(argv)
    try:
        _check_environment()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        config = load(args.config, args.overrides)
        path = Path(args.config).resolve()
        folder = path.parent if path.name == "config.yaml" else Path(config.run)
        folder.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RANK", "0") == "0":
            _record(config, folder / "config.yaml")
    except (ValueError, OSError) as error:
        state.tell(f"error: {error}")
        return 1 if isinstance(error, OSError) and error.errno in state.MAY_PASS else 2
    try:
        run = Run(config, folder.resolve(), stop or Stop())
    except RankGone as error:
        return _failed(folder, error, error.status)
    except (ValueError, FileNotFoundError, PermissionError) as error:  # data or a checkpoint that do not fit the config
        return _failed(folder, error, 2)
    except Exception as error:
        return _failed(folder, error, 1, trace=not _is_told(error))
    try:
        return train(run)
    except (ValueError, FloatingPointError) as error:  # a damaged sample, a non-finite gradient: the line says it all
        return _failed(folder, error, 1)
    except Exception as error:
        if _is_told(error):
            return _failed(folder, error, 1)
        if gone := run.peers.gone():  # what a collective's own error means
            return _failed(folder, gone, gone.status)
        return _failed(folder, error, 1, trace=True)


def _check_environment() -> None:
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("OMP_NUM_THREADS", 1), ("MASTER_PORT", 0)):
        value = os.environ.get(name)
        if value is not None and not (value.isdecimal() and int(value) >= least):
            raise ValueError(
                f"{name}={value!r} in the environment: must be a whole number from {least} on; unset it, or use torchrun"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_PORT" not in os.environ:
        raise ValueError(
            "MASTER_PORT is not set although there are several ranks (WORLD_SIZE); use torchrun, or set it"
        )


def _is_told(error: Exception) -> bool:
    """Say whether a line tells all of an error: a full disk, or one of our own (it has no number), such as a missing rank."""
    return isinstance(error, OSError) and (error.errno is None or state.is_full(error))


def _record(config: Config, path: Path) -> None:
    """Write the config of a new run, or say how this start differs from it: by hand it may be changed, but not unawares."""
    if not path.exists():
        durable.write_atomically(path, dump(config).encode())
        return
    changed = [f"{k} {a!r} -> {b!r}" for k, a, b in differences(to_dict(load(path)), to_dict(config)) if k != "run"]
    if changed:
        state.tell(f"warning: {path} says otherwise and stays as it is; this start goes by: {', '.join(changed)}")


def _failed(folder: Path, error: Exception, status: int, trace: bool = False) -> int:
    if trace:
        state.tell("".join(traceback.format_exception(error)).rstrip())
    state.tell(f"error: {error}")
    state.fail(folder, error)
    return status


if __name__ == "__main__":
    exit_status = main(stop=STOP)
    STOP.settle()
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_status not in (0, 75, 130):
        os._exit(exit_status)  # a peer may be gone: the process group's destructors would wait for it or abort
    sys.exit(exit_status)
