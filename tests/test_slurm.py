"""On a real Slurm: a run survives what clusters do to it, stops when it is told to, and leaves nothing behind."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests import shards, slurm_machine, small_checkout
from tests.small_checkout import ROOT, environment, processes_of, state, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_machine.missing()), reason=slurm_machine.missing()),
]
SLURM = (
    "cluster.kind=slurm",
    "cluster.nodes=2",
    "cluster.ranks_per_node=2",
    "micro_batch=5",
    "cluster.setup=['export GLOO_SOCKET_IFNAME=lo']",
)


@pytest.fixture(scope="module")
def machine():
    with slurm_machine.SlurmMachine(nodes=3) as machine:
        yield machine


@pytest.fixture
def root(tmp_path, machine):
    root = small_checkout.make(tmp_path)
    yield root
    if job_ids(machine):
        machine.call("scancel", "--full", "--signal=KILL", *job_ids(machine))
        machine.call("scancel", *job_ids(machine))
    wait_for(lambda: not job_ids(machine))
    wait_for(lambda: not processes_of(root))


def job_ids(machine):
    return machine.call("squeue", "-h", "-o", "%A").split()


def run_command(machine, root, *words, behave=None):
    variables = {**environment(behave), **machine.environment, "BEHAVE": json.dumps(behave or {})}
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=variables, capture_output=True, text=True, timeout=300
    )


def submit(machine, root, *words, behave=None):
    """Submit the small run; return its job id."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_command(machine, root, "cluster/submit.py", "configs/small.yaml", *SLURM, *words, behave=behave)
    assert done.returncode == 0, done.stderr
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of processors: a busy machine must not fail the test
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 2
    return done.stdout.partition("submitted Slurm job ")[2].partition(":")[0]


def job_state(machine, job_id):
    return machine.call("squeue", "-h", "--states=all", "-o", "%T", "-j", job_id).strip()


def ended(machine, job_id, seconds=300):
    """Wait for a job's end and return its state; between two lives it is pending, not ended."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    return wait_for(lambda: job_state(machine, job_id) in over and job_state(machine, job_id), seconds)


def running_past(machine, root, images, run="small"):
    return wait_for(lambda: state(root / "runs" / run).get("clock", 0) >= images and state(root / "runs" / run))


def test_submit_to_the_end(machine, root):
    job_id = submit(machine, root, "cluster.finish_sigma_rel=0.13", "data.encode_from=somewhere")
    assert ended(machine, job_id) == "COMPLETED"
    logs = root / "runs/small/logs"
    for rank in range(4):
        assert f"rank {rank} of 4 at 127.0.0.1" in (logs / f"0001_rank{rank}.log").read_text()
    assert (root / "runs/small/samples/grid.png").is_file()
    again = run_command(machine, root, "cluster/submit.py", "runs/small")
    assert again.returncode == 0 and again.stdout.startswith("runs/small is finished at 400 images")


@pytest.mark.parametrize("how", ["USR2", "requeue", "preemption", "kill"])
def test_interrupted_and_finished_in_another_life(machine, root, how):
    job_id = submit(machine, root, behave={"hold": 60, "save_seconds": 1})
    disturb(machine, root / "runs/small", job_id, how)
    assert ended(machine, job_id) == "COMPLETED"
    run = root / "runs/small"
    assert state(run)["attempt"] == 2 and state(run)["clock"] == 400 and (run / "logs/0002_rank3.log").is_file()
    checkpoints = sorted(int(p.name) for p in (run / "checkpoints").glob("[0-9]*"))
    assert len(checkpoints) == (1 if how == "kill" else 2), "it saved before it left"


def disturb(machine, run, job_id, how, images=60):
    """Do to a running job what happens to jobs."""
    wait_for(lambda: state(run).get("clock", 0) >= images)
    if how == "USR2":  # as before the time limit, whose own signal comes up to a minute early
        machine.call("scancel", "--signal=USR2", job_id)
    elif how == "requeue":
        machine.call("scontrol", "requeue", job_id)
    elif how == "preemption":
        machine.call("sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    elif how == "kill":
        os.kill(state(run)["pid"], signal.SIGKILL)
    elif how == "node":
        node = json.loads((run / "logs/submitit/0001/rank3.json").read_text())["host"]
        machine.kill_node(node)
        wait_for(lambda: job_state(machine, job_id) != "RUNNING")
        machine.start_node(node)


def test_a_node_goes_down(machine, root):
    job_id = submit(machine, root, behave={"hold": 60})
    disturb(machine, root / "runs/small", job_id, "node")
    assert ended(machine, job_id) == "COMPLETED"
    assert state(root / "runs/small")["attempt"] == 2
    wait_for(lambda: len(machine.call("sinfo", "-h", "-N", "-p", "train", "-t", "idle", "-o", "%N").split()) == 3)


def test_scancel_is_final(machine, root):
    job_id = submit(machine, root, behave={"hold": 60, "save_seconds": 1})
    running_past(machine, root, 60)
    machine.call("scancel", job_id)
    assert ended(machine, job_id) == "CANCELLED"
    assert len(list((root / "runs/small/checkpoints").glob("[0-9]*"))) == 1  # SIGTERM left time to save


def test_cancel_saves_and_the_run_can_go_on_elsewhere(machine, root):
    job_id = submit(machine, root, behave={"hold": 60, "save_seconds": 1})
    running_past(machine, root, 60)
    twice = run_command(machine, root, "cluster/submit.py", "runs/small")
    assert twice.returncode == 2 and f"Slurm job {job_id} is RUNNING" in twice.stderr and twice.stderr.count("\n") == 1
    done = run_command(machine, root, "-m", "cluster.cancel", "runs/small")
    (saved,) = (root / "runs/small/checkpoints").glob("[0-9]*")
    assert done.returncode == 0 and f"runs/small is stopped at {int(saved.name)} images" in done.stdout, done.stderr
    assert job_state(machine, job_id) == "FAILED"  # Slurm's word for an exit status of 130
    again = run_command(machine, root, "cluster/submit.py", "runs/small", "cluster.kind=local", "cluster.nodes=1")
    assert again.returncode == 0 and again.stdout.startswith(f"resuming runs/small at {int(saved.name)} images")


def test_cancel_a_pending_job(machine, root):
    job_id = submit(machine, root, "cluster.slurm_parameters.begin=now+1hour")
    assert run_command(machine, root, "-m", "cluster.status").stdout.splitlines()[1].split("\t")[1] == "PENDING"
    assert run_command(machine, root, "-m", "cluster.cancel", "runs/small").returncode == 0
    assert job_state(machine, job_id) == "CANCELLED"


def test_no_progress_gives_up_and_says_why(machine, root):
    lives = [1, 2, 3]
    wrongs = [
        {"lives": lives, "clock": 40, "ranks": [1], "status": 7},
        {"lives": lives, "clock": 20, "ranks": [0, 2, 3], "status": None},
    ]
    job_id = submit(machine, root, "cluster.max_restarts=1", behave={"wrongs": wrongs})
    assert ended(machine, job_id) == "FAILED"
    verdict = json.loads((root / "runs/small/logs/verdict.json").read_text())
    assert (
        "attempt 3: rank 1 ended with status 7; 2 attempts in a row without progress beyond 20 images"
        in verdict["verdict"]
    )
    assert (
        "something went wrong in rank 1"
        in (root / "runs/small/logs/0003_rank1.log").read_text()
        == open(verdict["log"]).read()
    )


def test_a_users_error_is_not_restarted(machine, root):
    job_id = submit(machine, root, behave={"wrongs": [{"lives": [1], "clock": 20, "ranks": [0, 1, 2, 3], "status": 2}]})
    assert ended(machine, job_id) == "FAILED"
    assert state(root / "runs/small")["attempt"] == 1
    assert "ended with status 2" in run_command(machine, root, "-m", "cluster.status", "runs/small").stdout


def test_a_typo_costs_one_line(machine, root):
    done = run_command(machine, root, "cluster/submit.py", "configs/small.yaml", *SLURM, "cluster.partition=trian")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "invalid partition" in done.stderr.lower() and "cluster.*" in done.stderr
    assert job_ids(machine) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting an empty disk over a folder, for one node only, needs root")
def test_a_node_that_cannot_read_the_data_is_named_and_left_out(machine, root):
    shards.make_dataset(root / "data/small", shape=(1, 8, 8), codec="pixels")
    machine.restart_node("127.0.0.1", hide=root / "data/small")
    try:
        job_id = submit(machine, root, "cluster.preflight=true", "model.label_dim=0")
        assert ended(machine, job_id) == "COMPLETED"
    finally:
        machine.restart_node("127.0.0.1")
    run = root / "runs/small"
    excluded = json.loads((run / "logs/excluded.json").read_text())
    assert list(excluded) == ["127.0.0.1"] and "manifest.json" in excluded["127.0.0.1"]
    verdict = json.loads((run / "logs/verdict.json").read_text())["verdict"]
    assert "node 127.0.0.1 is left out: data:" in verdict
    hosts = {json.loads((run / f"logs/submitit/0002/rank{k}.json").read_text())["host"] for k in range(4)}
    assert hosts == {"127.0.0.2", "127.0.0.3"} and state(run)["attempt"] == 1, "the trainer never saw the bad node"


def test_preemption_without_a_user_signal(root, machine):
    with slurm_machine.SlurmMachine(nodes=2, kill_wait=10, user_signal=False) as plain:
        job_id = submit(plain, root, behave={"hold": 60, "save_seconds": 1})
        running_past(plain, root, 60)
        plain.call("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        assert ended(plain, job_id) == "COMPLETED"
        assert (
            state(root / "runs/small")["attempt"] == 2
            and len(list((root / "runs/small/checkpoints").glob("[0-9]*"))) == 2
        )


# ---------------------------------------------------------------------------------------------------------------------
# The true trainer.


def train(machine, folder, name):
    """Submit a short quickstart on 2 nodes x 2 tasks; return its job id and run directory."""
    run = folder / name
    words = (
        *SLURM,
        "micro_batch=64",
        "duration_images=8Ki",
        f"run={run}",
        f"data.path={folder}/digits",
        "cluster.finish_sigma_rel=0",
    )
    done = run_command(machine, ROOT, "cluster/submit.py", "configs/quickstart.yaml", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("submitted Slurm job ")[2].partition(":")[0], run


def final_tensors(run):
    found = {}
    for path in sorted((run / "checkpoints/0000008192").glob("*.safetensors")):
        found.update({f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()})
    return found


@pytest.fixture(scope="module")
def undisturbed(machine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("true")
    job_id, run = train(machine, folder, "undisturbed")
    assert ended(machine, job_id) == "COMPLETED", (run / "logs/0001_rank0.log").read_text()
    return folder


@pytest.mark.parametrize("how", ["USR2", "preemption", "requeue", "node"])
def test_disturbed_weights_equal_the_undisturbed_bitwise(machine, undisturbed, how):
    job_id, run = train(machine, undisturbed, how)
    disturb(machine, run, job_id, how, images=1024)
    assert ended(machine, job_id) == "COMPLETED"
    assert state(run)["attempt"] == 2 and (run / "logs/0002_rank3.log").is_file()
    expected, found = final_tensors(undisturbed / "undisturbed"), final_tensors(run)
    assert expected.keys() == found.keys() and len(expected) > 100
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_goes_on_with_fewer_nodes(machine, undisturbed):
    job_id, run = train(machine, undisturbed, "elastic")
    wait_for(lambda: state(run).get("clock", 0) >= 1024)
    pid = state(run)["pid"]
    os.kill(pid, signal.SIGSTOP)  # the run is short: it might end before the command has begun
    command = [sys.executable, "-m", "cluster.cancel", str(run)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **machine.environment}) as cancel:
        wait_for((run / "logs/cancelled.json").exists)
        os.kill(pid, signal.SIGCONT)
    assert cancel.returncode == 0
    saved = state(run)["clock"]
    done = run_command(machine, ROOT, "cluster/submit.py", str(run), "cluster.nodes=1", "cluster.ranks_per_node=2")
    assert done.returncode == 0 and f"at {saved} images" in done.stdout, done.stderr
    job_id = done.stdout.partition("submitted Slurm job ")[2].partition(":")[0]
    assert ended(machine, job_id) == "COMPLETED"
    expected, found = whole_weights(undisturbed / "undisturbed"), whole_weights(run)
    assert expected.keys() == found.keys()
    for name in expected:  # the same samples and noise; only sums over ranks are rounded in another order
        assert (expected[name] - found[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name


def whole_weights(run):
    """The averages of the last snapshot, which hold every step of the run."""
    last = max((run / "snapshots").glob("*.safetensors"), key=lambda p: p.name)
    return {name: tensor.float() for name, tensor in load_file(last).items()}
