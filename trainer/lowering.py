"""A network lowered by Inductor for a GPU that is not there: kernels are scheduled, none is compiled or run.

Traced on tensors without data, on a CPU, because autograd wants a device that exists; then moved, graph by graph. What a maintainer
must not break: layouts and attention are those that a GPU's libraries take in 16 bits. It stands on private parts of torch (2.13).
"""

import contextlib
import copy
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from models.denoiser import build
from models.prepared import prepare_

GPU = torch.device("cuda", 0)
# of an H200 (CUDA programming guide, compute capability 9.0; 132 multiprocessors by the data sheet)
H200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
                       max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=141 * 10**9)  # fmt: skip


def lower(model: dict, batch: int) -> dict[str, GraphLowering]:
    """Return what Inductor schedules for forward and backward of the network that `model` describes, with bf16 activations."""
    graphs, mode = {}, FakeTensorMode()

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def partition(gm, inputs, **options):
        compile_fx._recursive_joint_graph_passes(gm)
        return min_cut_rematerialization_partition(gm, inputs, compiler="inductor", **options)

    def keep(name: str):
        def compiler(gm, _):
            graphs[name] = _scheduled(copy.deepcopy(gm), mode, name == "backward")
            return make_boxed_func(gm.forward)

        return compiler

    with contextlib.ExitStack() as stack:
        for target, name, stand_in in (
            (torch.nn.functional, "scaled_dot_product_attention", flash),  # what a GPU takes in 16 bits
            (
                torch._C,
                "_conv_determine_backend_memory_format",
                lambda *_: torch.channels_last,
            ),  # cuDNN's, as its input
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: H200)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: H200)),
            (scheduler, "has_triton", lambda *_: True),
        ):
            stack.enter_context(patch.object(target, name, stand_in))
        stack.enter_context(mode)
        network = build(model | {"dropout": 0.0}, "bf16").train()
        prepare_(network, network.activations)
        tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        traced = aot_function(
            lambda tensors, *inputs: torch.func.functional_call(network, tensors, inputs), keep("forward"), keep("backward"),
            partition_fn=partition, decompositions=select_decomp_table(),
        )  # fmt: skip
        x = torch.empty(batch, network.channels, network.resolution, network.resolution)
        traced(tensors, x, torch.ones(batch), torch.zeros(batch, dtype=torch.int64)).sum().backward()
    return graphs


def _scheduled(gm: torch.fx.GraphModule, mode: FakeTensorMode, backward: bool) -> GraphLowering:
    """Move a traced graph to the GPU, lower and schedule it."""
    shapes = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU) for t in shapes]
    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": GPU}
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)
    with V.set_fake_mode(mode):
        compile_fx.view_to_reshape(gm)
        compile_fx._recursive_post_grad_passes(gm, is_inference=False)
        graph = GraphLowering(gm, example_inputs=inputs, is_inference=False, is_backward=backward)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
    return graph
