"""`engine.deterministic` takes effect before anything could read its variables, and leaves the user's own alone."""

import os

from tests.gloo import on_ranks


def probe(deterministic: bool, folder, environment: dict[str, str]) -> dict:
    """In a process of its own, return how things are at the first thing that a run does with CUDA and NCCL."""
    import torch

    import trainer.run
    from trainer.config import from_dict
    from trainer.stop import Stop

    for key in [k for k in os.environ if k.startswith(("CUBLAS", "NCCL", "TORCHINDUCTOR", "TRITON"))]:
        del os.environ[key]
    os.environ.update(environment)

    class Reached(Exception):
        pass

    def start(*args):
        raise Reached

    trainer.run.start_process_group = start
    plain = {"run": "x", "duration_images": 4, "global_batch": 4, "micro_batch": 4, "data": {"path": "x"}}
    try:
        trainer.run.Run(from_dict(plain | {"engine": {"deterministic": deterministic}}), folder, Stop())
    except Reached:
        keys = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        return {k: os.environ.get(k) for k in keys} | {
            "flag": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "fill": torch.utils.deterministic.fill_uninitialized_memory,
        }


def test_variables_and_flags_are_set_before_the_process_group(tmp_path):
    (seen,) = on_ranks(1, probe, True, tmp_path, {"RANK": "3", "NCCL_ALGO": "Tree"})
    assert (seen["CUBLAS_WORKSPACE_CONFIG"], seen["NCCL_ALGO"]) == (":4096:8", "Tree"), "the user's own choice stays"
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compile_cache" / "rank00003" / "inductor")
    assert (seen["flag"], seen["benchmark"], seen["fill"]) == (True, False, False)


def test_without_it_nothing_is_touched(tmp_path):
    (seen,) = on_ranks(1, probe, False, tmp_path, {})
    assert seen["CUBLAS_WORKSPACE_CONFIG"] is seen["NCCL_ALGO"] is seen["TRITON_CACHE_DIR"] is None and not seen["flag"]
