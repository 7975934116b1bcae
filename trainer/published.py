"""Published EDM2 snapshots (pickles) as a series of ours: a folder of them becomes a folder that posthoc, sweep and generate read.

Each network-snapshot-<kimg>-<std>.pkl becomes FOLDER/snapshots/ema-<images>-<sigma_rel>.safetensors, once; clock and length are in
its name alone. What must not break: nothing in a pickle is executed (models/inert_pickle.py), and none is half converted.
"""

from pathlib import Path

from data_pipeline.progress import Progress
from models import import_edm2
from trainer.snapshot_writer import file_name
from trainer.tensor_file import read_header


def adopt(folder: Path) -> list[str]:
    """Convert what has not been converted yet and return lines that tell; [] where no pickles lie in `folder`.

    Raises ValueError for a pickle whose name says no clock, for two of the same clock and length, and for one that is refused.
    """
    wanted: dict[Path, Path] = {}
    for source in sorted(folder.glob("*.pkl")):
        clock, sigma_rel = import_edm2.from_name(source.name)
        if not sigma_rel:
            raise ValueError(
                f"{source}: its name tells no clock and EMA length, as network-snapshot-0008388-0.050.pkl does"
            )
        if not clock:
            continue  # the network before training, which no average holds
        target = folder / "snapshots" / file_name(clock, sigma_rel)
        if target in wanted:
            raise ValueError(
                f"{source}: has the clock and EMA length of {wanted[target].name}; keep one network per folder"
            )
        wanted[target] = source
    missing = {target: source for target, source in wanted.items() if not _made_of(target, source)}
    if missing:
        (folder / "snapshots").mkdir(exist_ok=True)
        with Progress("converting", len(missing), "pickles") as progress:
            for target, source in missing.items():
                import_edm2.write(target, *import_edm2.read_pickle(source))
                progress.advance()
    return [f"{len(missing)} of {len(wanted)} pickles converted into {folder / 'snapshots'}"] if wanted else []


def _made_of(target: Path, source: Path) -> bool:
    """Say whether `target` was converted from a file of that name; raise ValueError where it is something else."""
    if not target.is_file():
        return False
    parent = read_header(target).get("parent", "")
    if parent.partition(" ")[0] != source.name:
        raise ValueError(f"{target}: was not made of {source.name}; two series share this folder, separate them")
    return True
