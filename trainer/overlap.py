"""Work on what was made while the next is made: a batch is decoded, written or measured while the one after it is drawn.

What must not break: results come in order and are those of `work` called in turn; no more than one item waits or is worked on, for
items hold memory; what `work` raises is raised to whoever iterates.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
Result = TypeVar("Result")


def overlapped(work: Callable[[Made, Tensor], Result], items: Iterable[tuple[Made, Tensor]]) -> Iterator[Result]:
    """Yield work(made, x) for each (made, x), in another thread while the next is made; on GPUs on a stream of its own as well."""
    streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(made: Made, x: Tensor):
        if x.device.type != "cuda":
            return beside.submit(_on, None, None, work, made, x)
        if x.device not in streams:
            streams[x.device] = torch.cuda.Stream(x.device)
        ready = torch.cuda.current_stream(x.device).record_event()
        return beside.submit(_on, streams[x.device], ready, work, made, x)

    with ThreadPoolExecutor(1, thread_name_prefix="evenkeel-overlap") as beside:
        under_way = None
        for made, x in items:
            done = [under_way.result()] if under_way is not None else []
            under_way = begin(made, x)
            del x  # the worker holds it as long as it needs it
            yield from done
        if under_way is not None:
            yield under_way.result()


def _on(stream, ready, work: Callable, made, x: Tensor):
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        if stream is not None:
            stream.wait_event(ready)
            x.record_stream(
                stream
            )  # made on another stream: its memory is not to be used again before this one is done
        return work(made, x)
