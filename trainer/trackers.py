"""TensorBoard and Weights & Biases, fed with the rows of trainer/metrics_table.py where a config asks for them; rank 0 only.

Both are imported when asked for and not before. The step is the run's clock, so that several starts of a run make one curve.
"""

from pathlib import Path


class TensorBoard:
    """Writes RUN/tensorboard/."""

    def __init__(self, run: Path, clock: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "metrics.tensorboard=true: the package is not installed; pip install tensorboard"
            ) from None
        # what an earlier start wrote beyond the clock is repeated
        self._open = lambda clock: SummaryWriter(str(run / "tensorboard"), purge_step=clock + 1 if clock else None)
        self.writer = self._open(clock)

    def log(self, clock: int, values: dict[str, float]) -> None:
        """Write one number per series; raise OSError where the disk takes none, and begin another file the next time."""
        self.writer = self.writer or self._open(0)
        try:
            for name, value in values.items():
                self.writer.add_scalar(name.removeprefix("evenkeel_"), value, clock)
            self.writer.flush()
        except OSError:  # its thread has ended
            self.writer = None
            raise

    def close(self) -> None:
        if self.writer:
            self.writer.close()


class WeightsAndBiases:
    """Logs to a project; the environment variables of wandb (WANDB_MODE=offline, ...) decide the rest."""

    def __init__(self, run: Path, project: str, config: dict):
        try:
            import wandb
        except ImportError:
            raise ValueError(f"metrics.wandb={project}: the package is not installed; pip install wandb") from None
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in run.name)
        self.session = wandb.init(project=project, id=name, name=run.name, dir=str(run), config=config, resume="allow")
        self.session.define_metric("*", step_metric="images_seen")

    def log(self, clock: int, values: dict[str, float]) -> None:
        """Log one number per series against the clock."""
        self.session.log(
            {name.removeprefix("evenkeel_"): value for name, value in values.items()} | {"images_seen": clock}
        )

    def close(self) -> None:
        self.session.finish()


def open_trackers(run: Path, metrics, clock: int, config: dict) -> list:
    """Open what the config group `metrics` asks for; ValueError where a package is missing."""
    trackers: list = [TensorBoard(run, clock)] if metrics.tensorboard else []
    if metrics.wandb:
        trackers.append(WeightsAndBiases(run, metrics.wandb, config))
    return trackers
