"""Work beside making: the results of work in turn, bit for bit, in bounded memory, and errors are told."""

import threading
import time
import weakref

import pytest
import torch

from trainer.host_copies import copy_to_host
from trainer.overlap import overlapped

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip


def chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(20):  # element by element: the same bits on every stream, which products in cuBLAS need not be
        x = torch.tanh(1.3 * x + 0.1)
    return x


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_those_of_one_after_the_other(device):
    """Items are made by work that is still under way on a GPU, and let go of at once, so that their memory is used again."""

    size = 2048 if device == "cuda" else 64

    def items():
        generator = torch.Generator().manual_seed(0)
        for i in range(12):
            yield i, chain(torch.randn(size, size, generator=generator).to(device))

    def work(i, x):
        return i, copy_to_host([chain(x)])[0]

    expected = [work(i, x) for i, x in items()]
    found = list(overlapped(work, items()))
    assert [i for i, _ in found] == list(range(12)) and all(x.device.type == "cpu" for _, x in found)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_one_item_is_worked_on_while_one_is_made():
    alive, most = weakref.WeakSet(), []
    begun = [threading.Event() for _ in range(6)]

    def items():
        for i in range(6):
            begun[i].set()
            x = torch.zeros(3)
            alive.add(x)
            yield i, x
            del x
            until = time.monotonic() + 5
            while len(alive) > 1 and time.monotonic() < until:  # the thread lets go a moment after it has answered
                time.sleep(0.001)
            most.append(len(alive))

    def work(i, x):
        return i == 5 or begun[i + 1].wait(10)  # never, were it done before the next is made

    assert list(overlapped(work, items())) == [True] * 6
    assert max(most) <= 1, "what has been worked on is still held"


def test_an_error_is_told_and_ends_the_work():
    seen = []

    def work(i, x):
        seen.append(i)
        if i == 2:
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"):
        list(overlapped(work, ((i, torch.zeros(1)) for i in range(10))))
    assert seen == [0, 1, 2]


def test_who_stops_listening_stops_the_work():
    seen = []
    results = overlapped(lambda i, x: seen.append(i), ((i, torch.zeros(1)) for i in range(10)))
    next(results)
    results.close()
    assert seen == [0, 1] and not any(t.name.startswith("evenkeel-overlap") for t in threading.enumerate())
