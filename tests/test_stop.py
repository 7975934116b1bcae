"""A signal is a request; ranks act on it together, one step after it was voted on."""

import os
import signal
import subprocess
import sys

import pytest

from tests.gloo import ROOT, on_ranks
from trainer.stop import INTERRUPTED, START_AGAIN, Stop


def vote(signals_at: dict) -> list[int]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    stop = Stop().listen()
    stop.vote_in(dist.new_group(backend="gloo"))
    answers = []
    for step in range(5):
        if number := signals_at.get((dist.get_rank(), step)):
            os.kill(os.getpid(), number)
        answers.append(stop.agreed())
    stop.finish()
    return answers


@pytest.mark.parametrize(
    "signals_at, answers",
    [
        ({}, [0, 0, 0, 0, 0]),
        ({(1, 2): signal.SIGTERM}, [0, 0, 0, START_AGAIN, START_AGAIN]),
        ({(0, 1): signal.SIGUSR2, (1, 1): signal.SIGINT}, [0, 0, INTERRUPTED, INTERRUPTED, INTERRUPTED]),
    ],
)
def test_all_ranks_hear_of_a_signal_to_one_at_the_same_step(signals_at, answers):
    assert on_ranks(2, vote, signals_at) == [answers, answers]


def test_listening_starts_without_torch():
    code = "from trainer.stop import Stop; Stop().listen(); import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_single_process_hears_itself():
    stop = Stop()
    assert stop.agreed() == 0
    stop.request(START_AGAIN)
    stop.request(INTERRUPTED)
    stop.request(START_AGAIN)
    assert stop.agreed() == INTERRUPTED, "Ctrl-C outranks: it must not be restarted"
