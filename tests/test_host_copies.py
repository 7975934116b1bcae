"""Copies in host memory hold what was there at the call, bit by bit, and share nothing with what training goes on to change."""

import pytest
import torch

from trainer.host_copies import copy_to_host

SHAPES = [(1,), (7, 13), (3, 5, 3, 3), (0,), (100_003,)]


def check(device: str, dtype) -> list[torch.Tensor]:
    tensors = [torch.randn(shape, device=device) for shape in SHAPES]
    tensors += [
        torch.randn(50, device=device)[10:40],
        torch.randn(4, 6, device=device).t(),
    ]  # of a flat partition; of no order
    expected = [t.cpu().to(dtype or t.dtype, copy=True) for t in tensors]
    copies = copy_to_host(tensors, dtype)
    for t in tensors:
        t.fill_(7.0)
    for copy, was in zip(copies, expected, strict=True):
        assert copy.device.type == "cpu" and copy.dtype == was.dtype and copy.shape == was.shape
        assert torch.equal(copy.contiguous().view(torch.uint8), was.contiguous().view(torch.uint8))
    return copies


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_a_copy_is_what_was_there(dtype):
    check("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_a_copy_from_a_gpu_is_page_locked_and_its_memory_serves_again(dtype):
    before = check("cuda", dtype)
    assert all(copy.is_pinned() for copy in before if copy.numel())
    kept = [copy.clone() for copy in before]
    later = check("cuda", dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True)), "what is still in use is not written to"
    places = {copy.data_ptr() for copy in [*before, *later] if copy.numel()}
    del before, later
    assert {copy.data_ptr() for copy in check("cuda", dtype) if copy.numel()} <= places


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_waits_for_what_the_device_has_still_to_do():
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        a = torch.nn.functional.normalize(a @ a)
    [copy] = copy_to_host([a])
    assert torch.equal(copy, a.cpu())
