"""Encode a dataset with many processes: on this machine, or as a Slurm job array.

    python cluster/encode.py imagenet/train data/img512 --codec sd-vae-ft-mse --codec-weights DIR --resolution 512 --device cuda \
        --tasks 32 cluster=slurm cluster.partition=gpu
    python cluster/submit.py configs/edm2_xs.yaml data.path=data/img512 --after runs/encode_img512

Shares the work of data_pipeline.encode: task k of N makes every N-th shard that is not there yet, the last to finish writes the
manifest. The same command again makes only what is missing. What must not break: torch-free, and a wrong option dies here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run by path: `cluster` and `trainer` are names that other distributions own too
    sys.path[0] = str(ROOT)

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402

import submitit  # noqa: E402
import yaml  # noqa: E402

from cluster import encode_task, endings, run_directory, slurm  # noqa: E402
from cluster.code_copy import copy_code  # noqa: E402
from cluster.job import die_with_parent  # noqa: E402
from cluster.run_directory import read_json, shown, write_atomically  # noqa: E402
from data_pipeline import manifest  # noqa: E402
from data_pipeline.command import command_line  # noqa: E402
from trainer.config import CONFIGS, read_yaml  # noqa: E402
from trainer.groups import Cluster  # noqa: E402
from trainer.typed import build  # noqa: E402

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0


def compose(words: list[str]) -> Cluster:
    """Return the cluster group from `cluster=NAME` and `cluster.key=value` words; ValueError for an unknown or wrong one."""
    plain: dict = {}
    for word in words:
        key, _, value = word.partition("=")
        if key == "cluster":
            names = sorted(p.stem for p in (CONFIGS / "cluster").glob("*.yaml"))
            if value not in names:
                raise ValueError(f"{word}: no file configs/cluster/{value}.yaml; there are {', '.join(names)}")
            plain = read_yaml(CONFIGS / "cluster" / f"{value}.yaml") | plain
            continue
        *groups, last = key.split(".")[1:]
        place = plain
        for group in groups:
            place = place.setdefault(group, {})
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{word}: not understood; put quotes around values with special characters") from None
    return build(Cluster, plain, "cluster.")


def plan(source: str, folder: Path, options: list[str]) -> dict:
    """Return {images, shards} as data_pipeline.encode counts them; ValueError with its reason where it refuses."""
    command = [sys.executable, "-m", "data_pipeline.encode", source, str(folder), *options, "--plan"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"data_pipeline.encode ended with status {done.returncode}"]
        raise ValueError(said[-1].partition("error: ")[2] or said[-1])
    return json.loads(done.stdout.splitlines()[-1])


def commands(source: str, folder: Path, options: list[str], tasks: int) -> list[list[str]]:
    """Return what each task runs after `python -m`."""
    return [["data_pipeline.encode", source, str(folder), *options, "--part", f"{k}/{tasks}"] for k in range(tasks)]


def shards_made(folder: Path) -> int:
    """Return how many shards are there, by their names."""
    return len(list(folder.glob("shard-*.tar")))


def submit(c: Cluster, job: Path, parts: list[list[str]], parallel: int, after: str) -> list[str]:
    """Submit the parts as a job array, `parallel` at once; return lines that say how to follow it."""
    made = submitit.SlurmExecutor(job / "logs" / "slurm")
    again = f"{sys.executable} -m cluster.encode_task --status $status --max-restarts {c.max_restarts}"
    on_gpu = any(word.startswith("cuda") for word in parts[0])
    made.update_parameters(
        **slurm.parameters(c, job / "code", after),
        job_name=job.name,
        nodes=1,
        ntasks_per_node=1,
        gpus_per_node=1 if on_gpu else None,
        array_parallelism=parallel,
        teardown=["status=$?", "trap '' TERM", again, "exit $?"],
    )
    jobs = slurm.submit_quietly(lambda: made.map_array(encode_task.run, parts))
    job_id = jobs[0].job_id.partition("_")[0]
    write_atomically(job / "logs" / "slurm_job.json", json.dumps({"job_id": job_id}))
    return [
        f"submitted Slurm job {job_id}: {len(parts)} tasks, {parallel} at once{f', {after}' if after else ''}",
        f"  logs:    {shown(job / 'logs' / 'slurm')}/{job_id}_*.out",
        "  follow:  the same command again",
        f"  stop:    scancel {job_id}; the same command again goes on",
        f"  then:    python cluster/submit.py CONFIG --after {job_id}",
    ]


def run_here(c: Cluster, job: Path, parts: list[list[str]], folder: Path, shards: int) -> int:
    """Run all parts at once on this machine, a crashed one again; return the first status that is not 0."""
    environment = {**os.environ, "PYTHONPATH": str(job / "code"), "OMP_NUM_THREADS": str(c.cpus_per_rank)}
    environment |= {name: str(value) for name, value in c.environment.items()}

    def start(k: int) -> subprocess.Popen:
        with open(job / "logs" / f"task{k}.log", "a") as log:
            command = [sys.executable, "-m", *parts[k]]
            how = {
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": subprocess.STDOUT,
                "preexec_fn": die_with_parent,
            }
            return subprocess.Popen(command, cwd=job / "code", env=environment, **how)

    running, restarts, bad = {k: start(k) for k in range(len(parts))}, dict.fromkeys(range(len(parts)), 0), 0
    said = time.monotonic()
    try:
        while running and bad != endings.USER_ERROR:
            for k, child in list(running.items()):
                status = child.poll()
                if status is None:
                    continue
                del running[k]
                if status not in (endings.FINISHED, endings.USER_ERROR) and restarts[k] < c.max_restarts:
                    restarts[k] += 1
                    print(f"task {k} ended with status {status}; starting it again", flush=True)
                    running[k] = start(k)
                elif status:
                    bad = bad or status
                    last = (job / "logs" / f"task{k}.log").read_text().strip().splitlines()[-1:]
                    print(f"task {k}: {''.join(last)}; log: {shown(job / 'logs' / f'task{k}.log')}", file=sys.stderr)
            time.sleep(POLL_SECONDS)
            if time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                print(f"{shards_made(folder)} of {shards} shards", flush=True)
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
    return bad if bad >= 0 else 128 - bad


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str], Cluster]:
    """Return our options, those of data_pipeline.encode, and the cluster group; ValueError for a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python cluster/encode.py",
        description="Encode a dataset with many processes, here or on Slurm.",
        epilog="All other options go to data_pipeline.encode: --codec, --codec-weights, --device, --resolution, ...",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="as for data_pipeline.encode: a folder of images, a zip, a tar, ...")
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--tasks", type=int, default=1, help="processes that share the work (default %(default)s)")
    parser.add_argument("--parallel", type=int, help="of them at once, on Slurm (default: all)")
    parser.add_argument(
        "--after", action="append", default=[], metavar="JOB", help="start when this Slurm job has ended well"
    )
    words = sys.argv[1:] if argv is None else argv
    ours = [word for word in words if re.match(r"cluster(\.[\w.]+)?=", word)]
    options, others = parser.parse_known_args([word for word in words if word not in ours])
    c = compose(ours)
    for name, value in (("--tasks", options.tasks), ("--parallel", options.parallel)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    if "--part" in others:
        raise ValueError("--part: is chosen for every task; say how many there are with --tasks")
    if options.after and c.kind == "local":
        raise ValueError(f"--after {options.after[0]}: waits for a Slurm job, but this is local; add cluster=slurm")
    return options, others, c


@command_line("the same command goes on from here")
def main(argv: list[str] | None = None) -> int:
    """Encode what is missing; return the exit status."""
    options, others, c = parse(argv)
    folder = options.folder.resolve()
    source = str(Path(options.source).resolve()) if Path(options.source).exists() else options.source
    job = ROOT / "runs" / f"encode_{folder.name}"
    if manifest.manifest_path(folder).is_file():
        found = manifest.load(str(folder))
        print(f"{shown(folder)} is made: {found.num_samples} samples of {found.source}, {found.codec}")
        return endings.FINISHED
    if state := slurm.active_state(job):
        print(f"Slurm job {slurm.job_of(job)} is {state}: {shards_made(folder)} shards are there")
        return endings.FINISHED
    after = slurm.after(options.after) if options.after else ""
    found = plan(source, folder, others)
    tasks = min(options.tasks, found["shards"])
    earlier = read_json(job / "encode.json").get("folder", str(folder))
    if earlier != str(folder):
        raise ValueError(f"{shown(job)} is of another folder, {earlier}; delete it, or give the new one another name")
    run_directory.heed_umask(c)
    job.mkdir(parents=True, exist_ok=True)
    lock = run_directory.hold(job)  # until this process ends
    assert lock >= 0
    (job / "logs").mkdir(exist_ok=True)
    copy_code(ROOT, job / "code")
    write_atomically(job / "encode.json", json.dumps({"version": 1, "source": source, "folder": str(folder)}))
    print(
        f"{found['images']} images in {found['shards']} shards, {shards_made(folder)} there; logs: {shown(job / 'logs')}"
    )
    parts = commands(source, folder, others, tasks)
    if c.kind == "slurm":
        print("\n".join(submit(c, job, parts, options.parallel or tasks, after)))
        return endings.FINISHED
    status = run_here(c, job, parts, folder, found["shards"])
    if status == endings.FINISHED:
        print(f"{shown(folder)} is made: {manifest.load(str(folder)).num_samples} samples")
    return status


if __name__ == "__main__":
    sys.exit(main())
