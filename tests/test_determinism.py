"""`engine.deterministic` takes effect before anything could read its variables, and leaves the user's own alone."""

import json
import os
import subprocess
import sys

from tests.gloo import ROOT

PROBE = """
import json, os, sys
from pathlib import Path
from trainer.config import from_dict
from trainer.run import Run
from trainer.stop import Stop
import torch, trainer.run

class Reached(Exception): pass
def start(*args):
    # the first thing that a run does with CUDA and NCCL
    keys = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    print(json.dumps({k: os.environ.get(k) for k in keys} | {
        "flag": torch.are_deterministic_algorithms_enabled(), "benchmark": torch.backends.cudnn.benchmark,
        "fill": torch.utils.deterministic.fill_uninitialized_memory}))
    raise Reached
trainer.run.start_process_group = start
config = from_dict({"run": "x", "duration_images": 4, "global_batch": 4, "micro_batch": 4, "data": {"path": "x"},
                    "engine": {"deterministic": sys.argv[1] == "true"}})
try:
    Run(config, Path(sys.argv[2]), Stop())
except Reached:
    pass
"""


def probe(value: str, folder, **environment) -> dict:
    known = {k: v for k, v in os.environ.items() if not k.startswith(("CUBLAS", "NCCL", "TORCHINDUCTOR", "TRITON"))}
    command = [sys.executable, "-c", PROBE, value, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=known | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_variables_and_flags_are_set_before_the_process_group(tmp_path):
    seen = probe("true", tmp_path, RANK="3", NCCL_ALGO="Tree")
    assert (seen["CUBLAS_WORKSPACE_CONFIG"], seen["NCCL_ALGO"]) == (":4096:8", "Tree"), "the user's own choice stays"
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compile_cache" / "rank00003" / "inductor")
    assert (seen["flag"], seen["benchmark"], seen["fill"]) == (True, False, False)


def test_without_it_nothing_is_touched(tmp_path):
    seen = probe("false", tmp_path)
    assert seen["CUBLAS_WORKSPACE_CONFIG"] is seen["NCCL_ALGO"] is seen["TRITON_CACHE_DIR"] is None and not seen["flag"]
