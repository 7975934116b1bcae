"""On a real Slurm: sweeps in lanes, chains of jobs, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline import manifest
from tests.small_checkout import ROOT, release, state, wait_for
from tests.test_slurm import ended, job_ids, job_state, machine, pytestmark, root, run_command  # noqa: F401

ON_SLURM = ("cluster.kind=slurm", "cluster.ranks_per_node=1")


def sweep(machine, root, *words, behave=None):  # noqa: F811
    done = run_command(machine, root, "cluster/submit.py", "configs/small.yaml", *ON_SLURM, *words, behave=behave)
    assert done.returncode == 0, done.stderr
    return done.stdout


def job_of(run):
    return json.loads((run / "logs/slurm_job.json").read_text())["job_id"]


def running(machine):  # noqa: F811
    return machine.call("squeue", "-h", "--states=RUNNING", "-o", "%A").split()


def test_a_sweep_runs_in_lanes_and_restarts_what_failed(machine, root):  # noqa: F811
    words = ("--sweep", "seed=0,1,2,3", "--parallel", "2")
    out = sweep(machine, root, *words, behave={"step_seconds": 0.5})
    assert out.count("submitted Slurm job") == 4 and "4 points in runs/small-sweep, 2 at once" in out
    runs = [root / f"runs/small-sweep/small_seed={k}" for k in range(4)]
    jobs = [job_of(run) for run in runs]
    wait_for(lambda: all(state(run).get("clock", 0) > 20 for run in runs[:2]))
    assert len(running(machine)) == 2
    machine.call("scontrol", "requeue", jobs[0])  # between two lives it has not ended: who waits for it waits on
    machine.call("scancel", "--signal=KILL", jobs[1])  # crashes are restarted by policy
    most, until = 0, time.monotonic() + 300
    while job_ids(machine) and time.monotonic() < until:
        most = max(most, len(running(machine)))
        if job_state(machine, jobs[0]) not in ("COMPLETED", ""):
            assert job_state(machine, jobs[2]) == "PENDING"
        time.sleep(0.2)
    assert most <= 2, "afterwards it is a matter of chance whether two are seen at once"
    assert state(runs[0])["attempt"] == 2
    done = [state(run)["clock"] == 400 for run in runs]
    assert done[0] and done[2] and done[3]
    out = sweep(machine, root, *words)
    assert out.count("finished\n") == sum(done) and out.count("submitted Slurm job") == 4 - sum(done)
    wait_for(lambda: not job_ids(machine))
    shown = run_command(machine, root, "-m", "cluster.status", "runs/small-sweep").stdout.splitlines()
    assert [line.split("\t")[:3] for line in shown[1:]] == [[str(k), "finished", "400"] for k in range(4)]


def test_cancel_stops_all_points_and_the_sweep_goes_on(machine, root):  # noqa: F811
    words = ("--sweep", "seed=0,1,2", "--parallel", "1")
    sweep(machine, root, *words, behave={"hold": 20})
    first = root / "runs/small-sweep/small_seed=0"
    wait_for(lambda: state(first).get("clock", 0) >= 20)
    again = sweep(machine, root, *words)  # nothing is started twice
    assert again.count("submitted") == 0 and again.count("is PENDING") == 2 and again.count("is RUNNING") == 1
    done = run_command(machine, root, "-m", "cluster.cancel", "runs/small-sweep")
    assert done.returncode == 0 and done.stdout.count("is stopped at") == 3 and job_ids(machine) == [], done.stderr
    assert state(first)["clock"] == max(int(p.name) for p in (first / "checkpoints").glob("[0-9]*"))
    assert sweep(machine, root, *words).count("submitted Slurm job") == 3
    wait_for(lambda: not job_ids(machine))
    assert state(first)["attempt"] == 2 and state(root / "runs/small-sweep/small_seed=2")["clock"] == 400


def test_a_chain_starts_in_order_and_a_broken_one_is_taken_down(machine, root):  # noqa: F811
    wrong = {"wrongs": [{"lives": [1], "clock": 100, "ranks": [0], "status": 2}]}
    sweep(machine, root, "run=runs/a", behave={"hold": 20})
    sweep(machine, root, "run=runs/b", "--after", "runs/a", behave=wrong)
    sweep(machine, root, "run=runs/c", "--sweep", "seed=0,1", "--after", job_of(root / "runs/b"))
    a, b = (job_of(root / f"runs/{name}") for name in "ab")
    wait_for(lambda: job_state(machine, a) == "RUNNING")
    assert job_state(machine, b) == "PENDING"
    release(root / "runs/a")
    wait_for(lambda: not job_ids(machine))
    assert job_state(machine, a) == "COMPLETED" and job_state(machine, b) == "FAILED"
    points = [root / f"runs/c-sweep/c_seed={k}" for k in (0, 1)]
    assert [job_state(machine, job_of(run)) for run in points] == ["CANCELLED", "CANCELLED"]
    assert not any((run / "state.json").exists() for run in points)
    refused = run_command(machine, root, "cluster/submit.py", "configs/small.yaml", *ON_SLURM, "--after", "runs/b")
    assert refused.returncode == 2 and f"job {b} is FAILED" in refused.stderr and refused.stderr.count("\n") == 1
    sweep(machine, root, "run=runs/e", "--sweep", "seed=0,1")
    first, second = (job_of(root / f"runs/e-sweep/e_seed={k}") for k in (0, 1))
    assert f"afterok:{first}:{second}" in sweep(
        machine, root, "run=runs/f", "--after", "runs/e-sweep", "--after", "runs/a"
    )
    assert "submitted Slurm job" in sweep(
        machine, root, "run=runs/d", "--after", a
    )  # has ended well: nothing to wait for
    assert ended(machine, job_of(root / "runs/d")) == "COMPLETED"


def test_encode_train_and_sweep_in_one_go(machine, tmp_path):  # noqa: F811
    """The true commands: an array encodes, one element is killed on the way; then the trainer, then the post-hoc sweep."""
    data, run = tmp_path / f"digits-{os.getpid()}", tmp_path / "run"
    job = ROOT / "runs" / f"encode_{data.name}"
    encode = (
        "cluster/encode.py",
        "sklearn:digits",
        str(data),
        "--samples-per-shard",
        "20",
        "--tasks",
        "3",
        "--parallel",
        "2",
    )
    try:
        done = run_command(machine, ROOT, *encode, "cluster.kind=slurm")
        assert done.returncode == 0 and "3 tasks, 2 at once" in done.stdout, done.stderr
        array = job_of(job)
        again = run_command(machine, ROOT, *encode, "cluster.kind=slurm")
        assert again.returncode == 0 and f"Slurm job {array} is" in again.stdout
        words = (
            "cluster.kind=slurm",
            "cluster.ranks_per_node=1",
            "duration_images=4Ki",
            "micro_batch=128",
            "data.heldout=0.1",
        )
        words += (
            f"run={run}",
            f"data.path={data}",
            "data.encode_from=",
            "cluster.finish_sigma_rel=0",
            "--after",
            str(job),
        )
        done = run_command(machine, ROOT, "cluster/submit.py", "configs/quickstart.yaml", *words)
        assert done.returncode == 0 and f"afterok:{array}" in done.stdout, done.stderr
        training = job_of(run)
        sweep = ("cluster/sweep.py", str(run), "--sigma-rel", "0.08,0.1", "--max-error", "1", "--after", training)
        done = run_command(machine, ROOT, *sweep)
        assert done.returncode == 0 and "submitted Slurm job" in done.stdout, done.stderr
        victim = wait_for(lambda: _encoders(data))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: not job_ids(machine))
        assert any("starting again" in p.read_text() for p in (job / "logs/slurm").glob("*.out"))
        assert manifest.load(str(data)).num_samples == 1797 and not any(p.name.startswith(".") for p in data.iterdir())
        assert state(run)["status"] == "finished" and len((run / "sweep/sweep.csv").read_text().splitlines()) == 3
    finally:
        shutil.rmtree(job, ignore_errors=True)


def test_an_element_that_ends_without_a_word_is_run_again(machine, root):  # noqa: F811
    (root / "runs/x").mkdir(parents=True)
    (root / "runs/x/config.yaml").write_text((root / "configs/small.yaml").read_text())
    (root / "killed_once.py").write_text(
        "import os, pathlib, sys\n"
        "mark = pathlib.Path(sys.argv[1]); again = mark.exists(); mark.write_text('2' if again else '1')\n"
        "again or os.kill(os.getppid(), 9)\n"
    )
    (root / "fine.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('x')")
    code = (
        "from pathlib import Path; from cluster import sweep_array; sweep_array.GRACE_SECONDS = 2.0\n"
        "sweep_array.execute(Path('runs/x').resolve(), Path.cwd(), [['killed_once', 'a'], ['fine', 'b']], 2)"
    )
    done = run_command(machine, root, "-c", code)
    assert done.returncode == 0 and "1 tasks" in done.stdout and "2 tasks" in done.stdout, done.stderr
    assert (root / "a").read_text() == "2" and (root / "b").read_text() == "x"


def test_a_sweep_that_is_terminated_takes_its_jobs_along(machine, root):  # noqa: F811
    (root / "runs/x").mkdir(parents=True)
    (root / "runs/x/config.yaml").write_text((root / "configs/small.yaml").read_text())
    (root / "runs/x/snapshots").mkdir()
    (root / "runs/x/snapshots/ema-0000000400-0.050.safetensors").touch()
    (root / "trainer/posthoc.py").write_text("import time; time.sleep(600)")
    command = [sys.executable, "cluster/sweep.py", "runs/x", "--sigma-rel", "0.1", "--kind", "slurm"]
    process = subprocess.Popen(command, cwd=root, env=machine.environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: running(machine))
    process.terminate()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130 and "the same command goes on" in err
    wait_for(lambda: not job_ids(machine))


def _encoders(data):
    """Return the pid of an encoder that has begun."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if (
            f"data_pipeline.encode sklearn:digits {data}" in words
            and "submitit" not in words
            and list(data.glob(".encoding/*"))
        ):
            return int(path.parent.name)
    return 0
