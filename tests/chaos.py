"""Hit a small run at random instants and show that nothing is lost: `python -m tests.chaos --hits 50 --seed 0` (make chaos).

Two gloo ranks train on digits, in a RUN on a file system of a few megabytes (a tmpfs, for root; else /tmp, without full disks).
Each hit is one of KINDS, at an instant drawn from the seed; ranks that end are started again. A run that reaches its end is
compared with the undisturbed one, bitwise: checkpoint, every snapshot, and, from the audit that the ranks write as they train,
that the committed lineage holds every position exactly once, with the same loss. Then the next run takes the remaining hits.

Ranks are forked from this process, which has the libraries loaded: a start takes seconds instead of half a minute.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import torch

import tests.libraries  # noqa: F401 - loaded once, for all ranks
from data_pipeline import encode
from tests.gloo import free_port
from tests.test_resume import OVERRIDES, ROOT, snapshots_of, state_of
from trainer import audit, train
from trainer.config import dump, load
from trainer.peers import CONNECTING_SECONDS
from trainer.snapshots import list_snapshots
from trainer.stop import Stop

BATCH, WORLD = 64, 2
EXIT_SECONDS = 30  # within which a rank must end when another one died
HANG_SECONDS = 30  # how long ranks wait to meet one that died before they knew each other
DISK_BYTES = 96 << 20
KINDS = (
    "SIGKILL one rank",
    "SIGKILL all",
    "SIGTERM",
    "SIGUSR2",
    "SIGTERM, then SIGUSR2",
    "SIGKILL in a checkpoint",
    "SIGKILL in a snapshot",
    "SIGKILL at the start",
    "full disk",
    "truncated newest checkpoint",
    "bit flipped in newest checkpoint",
)


def logs_of(run: Path) -> Path:
    """Return where logs and audits lie: off the disk that is filled."""
    return run.parent.parent / "logs"


class Life:
    """One start of the run: its ranks."""

    def __init__(self, run: Path, data: Path, number: int, duration: int):
        self.duration, self.run, self.audit, self.since = (
            duration,
            run,
            logs_of(run) / f"{run.name}-audit",
            time.monotonic(),
        )
        port = free_port()
        self.logs = [logs_of(run) / f"{run.name}-{number:03d}-rank{r}.log" for r in range(WORLD)]
        self.before = self.trained()
        self.statuses: dict[int, int] = {}
        self.end_seconds = 300  # at its own end, unless a rank dies
        config = self._compose(data)
        self.pids = [self._fork(r, port, config) for r in range(WORLD)]

    def _compose(self, data: Path) -> Path:
        """Return a file with the whole config, which the ranks read without Hydra."""
        path = logs_of(self.run) / f"{self.run.name}.yaml"
        if not path.is_file():
            keys = [
                f"duration_images={self.duration}",
                "checkpoints.keep_last=2",
                f"engine.hang_seconds={HANG_SECONDS}",
            ]
            keys += [f"run={self.run}", f"data.path={data}", f"data.audit={self.audit}"]
            path.write_text(dump(load(ROOT / "configs/quickstart.yaml", [*OVERRIDES, *keys])))
        return path

    def _fork(self, rank: int, port: int, config: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            out = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            stop = Stop().listen()
            status = train.main([str(config)], stop)
            stop.settle()
        except BaseException as error:
            print(f"chaos: {error!r}", flush=True)
            status = 99
        sys.stdout.flush()
        os._exit(status)

    def alive(self) -> bool:
        """Collect the ranks that have ended; say whether one has not."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) < WORLD

    def whole(self) -> bool:
        self.alive()
        return not self.statuses

    def trained(self) -> int:
        return sum(path.stat().st_size for path in self.audit.glob("*")) if self.audit.is_dir() else 0

    def until(self, condition, seconds: float = 180) -> bool:
        """Wait for a condition while all ranks live; say whether it came."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.whole() or time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return self.whole()

    def steps(self) -> bool:
        """Wait for this life's first line of the audit after its beginning."""
        return self.until(lambda: self.trained() > self.before + 200)

    def send(self, number: int, ranks) -> None:
        if number == signal.SIGKILL:
            met = "attempt" in self.output()
            self.end_seconds = EXIT_SECONDS if met else HANG_SECONDS + CONNECTING_SECONDS + EXIT_SECONDS
        self.alive()
        for rank in ranks:
            if rank not in self.statuses:
                os.kill(self.pids[rank], number)

    def end(self, seconds: float | None = None) -> list[int]:
        """Return the exit statuses; a rank that does not end is the failure that this test looks for."""
        seconds = seconds or self.end_seconds
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                self.send(signal.SIGABRT, range(WORLD))
                raise SystemExit(f"FAILED: ranks did not end within {seconds:.0f} s\n{self.output()}")
            time.sleep(0.01)
        return [self.statuses[r] for r in range(WORLD)]

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs if log.exists())


class Chaos:
    """The hits, drawn from one seed."""

    def __init__(self, folder: Path, seed: int, hits: int, steps: int):
        self.steps, self.duration = steps, steps * BATCH
        self.folder, self.random, self.hits = folder, random.Random(seed), hits
        self.counts, self.restarts, self.runs, self.lives = Counter(), 0, 0, 0
        self.trained, self.in_vain, self.lost, self.missed = 0, 0, 0, 0
        self.deck: list[str] = []
        self.step_seconds = self.start_seconds = 1.0
        self.data = folder / "data"
        (folder / "logs").mkdir()
        assert encode.main(["sklearn:digits", str(self.data), "--codec", "pixels"]) == 0

    def play(self) -> None:
        """Run the reference, then runs under fire until the hits are used up; the last one may end in peace."""
        reference = self.folder / "disk" / "undisturbed"
        life = self.life(reference)
        assert life.steps(), life.output()
        self.start_seconds, begun = time.monotonic() - life.since, time.monotonic()
        assert life.end(300) == [0] * WORLD, life.output()
        self.step_seconds = (time.monotonic() - begun) / self.steps
        print(f"undisturbed: start {self.start_seconds:.1f} s, {1000 * self.step_seconds:.0f} ms a step", flush=True)
        self.expected = self.facts(reference)
        while sum(self.counts.values()) < self.hits:
            self.runs += 1
            self.under_fire(self.folder / "disk" / f"run{self.runs}")

    def life(self, run: Path) -> Life:
        self.lives += 1
        return Life(run, self.data, self.lives, self.duration)

    def under_fire(self, run: Path) -> None:
        life, finished = self.life(run), False
        while not finished:
            if sum(self.counts.values()) < self.hits:
                kind = self.draw()
                hit = self.hit(life, kind, run)
                self.counts[kind] += hit
                self.missed += not hit
                done = sum(self.counts.values())
                where = json.loads((run / "state.json").read_text())["clock"] if (run / "state.json").exists() else 0
                print(
                    f"[{done:3d}/{self.hits}] {kind:34s} {'' if hit else '(missed)':9s} at {where} images", flush=True
                )
                if life.whole() and (kind == "full disk" or not hit):
                    continue
            statuses = life.end()  # what a hit left alive ends by itself
            finished = statuses == [0] * WORLD
            if not finished:
                allowed = {0, 1, 75, -signal.SIGKILL}
                if not set(statuses) <= allowed or (1 in statuses and -signal.SIGKILL not in statuses):
                    raise SystemExit(f"FAILED: exit statuses {statuses}\n{life.output()}")
                if 75 in statuses and statuses != [75] * WORLD and -signal.SIGKILL not in statuses:
                    raise SystemExit(f"FAILED: ranks disagree on the exit status: {statuses}\n{life.output()}")
                self.restarts += 1
                life = self.life(run)
        self.compare(run)
        shutil.rmtree(run)

    def draw(self) -> str:
        if not self.deck:
            self.deck = self.random.sample(KINDS, len(KINDS))
            if not os.path.ismount(self.folder / "disk"):
                self.deck.remove("full disk")
        return self.deck.pop()

    def hit(self, life: Life, kind: str, run: Path) -> bool:
        """Do what `kind` says to a life under way; say whether it hit."""
        draw, rank = self.random.random(), self.random.randrange(WORLD)
        victims = [[rank], list(range(WORLD))][self.random.randrange(2)]
        if kind == "SIGKILL at the start":
            time.sleep(max(0.0, draw * self.start_seconds - (time.monotonic() - life.since)))
            life.send(signal.SIGKILL, victims)
            return True
        if not life.steps():
            return False
        if kind == "SIGKILL in a checkpoint":
            if not life.until(lambda: list((run / "checkpoints").glob(".*"))):
                return False
            time.sleep(draw * 0.01)
        elif kind == "SIGKILL in a snapshot":
            if not life.until(lambda: list((run / "snapshots").glob(".*.writing"))):
                return False
            time.sleep(draw * 0.002)
        else:
            time.sleep(draw * self.step_seconds * self.steps / 3)
        if not life.whole():
            return False
        if kind in ("SIGTERM", "SIGUSR2", "SIGTERM, then SIGUSR2"):
            for name in kind.split(", then "):
                life.send(signal.Signals[name], [rank])
            life.end(180)
        elif kind == "full disk":
            self.fill_disk(1.0 + 3.0 * draw)
        elif "checkpoint" in kind and not kind.startswith("SIGKILL"):
            life.send(signal.SIGKILL, range(WORLD))
            life.end()
            return self.damage(run, kind)
        else:
            life.send(signal.SIGKILL, range(WORLD) if kind == "SIGKILL all" else victims)
        return True

    def fill_disk(self, seconds: float) -> None:
        ballast = self.folder / "disk" / "ballast"
        with open(ballast, "wb", buffering=0) as f:
            try:
                while f.write(b"\0" * 4096):
                    pass
            except OSError:  # full, as it should be
                pass
        time.sleep(seconds)
        ballast.unlink()

    def damage(self, run: Path, kind: str) -> bool:
        found = sorted((run / "checkpoints").glob("[0-9]*"))
        if len(found) < 2:  # a run whose only checkpoint is damaged is refused, which is not what this looks for
            return False
        path = self.random.choice(sorted(found[-1].iterdir()))
        content = bytearray(path.read_bytes())
        where = self.random.randrange(len(content))
        if kind.startswith("truncated"):
            content = content[:where]
        else:
            content[where] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        return True

    def facts(self, run: Path) -> dict:
        """Return all that must not depend on what happened to a run."""
        headers = {s.path.name: s.header for s in list_snapshots(run)}
        for header in headers.values():
            for key in ("life", "life_start", "run", "commit"):  # of a checkout that somebody works in
                header.pop(key, None)
        lineage, in_vain = audit.committed(logs_of(run) / f"{run.name}-audit")
        self.trained += self.duration + in_vain
        self.in_vain += in_vain
        return {
            "state": state_of(run, self.duration),
            "snapshots": snapshots_of(run),
            "headers": headers,
            "lineage": lineage,
        }

    def compare(self, run: Path) -> None:
        facts, problems = self.facts(run), []
        for what in ("state", "snapshots"):
            a, b = facts[what], self.expected[what]
            problems += [f"{what}: {k} is not in both" for k in a.keys() ^ b.keys()]
            problems += [f"{what}: {k} differs" for k in a.keys() & b.keys() if not torch.equal(a[k], b[k])]
        if facts["headers"] != self.expected["headers"]:
            problems.append("snapshot headers differ")
        lineage, expected = facts["lineage"], self.expected["lineage"]
        problems += [
            f"position {p} trained on {len(lineage.get(p, []))} times"
            for p in range(self.duration)
            if len(lineage.get(p, [])) != 1
        ]
        problems += [f"position {p} beyond the end" for p in lineage if not 0 <= p < self.duration]
        problems += [f"position {p} had another loss" for p in lineage if lineage[p] != expected.get(p)]
        self.lost += self.duration - len(lineage)
        if problems:
            raise SystemExit(f"FAILED: {run.name}: {len(problems)} differences\n" + "\n".join(problems[:20]))
        print(
            f"{run.name} ended like the undisturbed run: {len(facts['state'])} tensors, {len(facts['headers'])} snapshots, "
            f"{len(lineage)} positions once each",
            flush=True,
        )


def main(argv=None) -> int:
    """Hit runs until the hits are used up; print what was done to them and what it cost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--hits", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40, help="of one run; checkpoints every 4, snapshots every 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the files for a look")
    options = parser.parse_args(argv)
    folder, started = Path(tempfile.mkdtemp(prefix="evenkeel-chaos-")), time.monotonic()
    disk = folder / "disk"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "evenkeel-chaos", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(small, capture_output=True).returncode == 0
    chaos = Chaos(folder, options.seed, options.hits, options.steps)
    try:
        chaos.play()
    finally:
        if not options.keep:
            if mounted:
                subprocess.run(["umount", "-l", str(disk)])
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"files in {folder}")
    for kind, count in sorted(chaos.counts.items()):
        print(f"{count:5d}  {kind}")
    if not mounted:
        print("    0  full disk: needs root, to mount a small file system")
    hits, seconds = sum(chaos.counts.values()), time.monotonic() - started
    print(f"{hits} hits, {chaos.restarts} restarts, {chaos.runs} runs, {seconds:.0f} s, seed {options.seed}")
    print(
        f"images lost: {chaos.lost}; repeated: {chaos.in_vain} of {chaos.trained} ({chaos.in_vain / chaos.trained:.0%})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
