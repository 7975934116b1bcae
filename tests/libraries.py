"""What every rank of a test loads, loaded once: only the server that ranks are forked from imports this.

It takes seconds of CPU time, of which a forked rank takes none: libraries, what DeepSpeed finds out about the machine by calling a
compiler, and our own modules.
"""

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import hydra  # noqa: F401
import pytest  # noqa: F401 - the functions that ranks call lie in modules of tests
import safetensors.torch  # noqa: F401
import torch._dynamo  # noqa: F401

import trainer.run  # noqa: F401

deepspeed.ops.__compatible_ops__  # noqa: B018 - looked up when it is first asked for
