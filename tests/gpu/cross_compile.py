"""
FlexAttention's Triton kernels for cards that are not there: inductor generates them on a faked CUDA device, Triton
compiles them for any target, and what a block of threads needs of shared memory is in the result.

Needs the triton package of the torch that is installed. Prints a table when run.
"""

import sys
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
import torch._dynamo.device_interface as device_interface
import torch.nn.attention.flex_attention as flex
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, tracing
from torch._inductor import async_compile, codecache, config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from torch.utils._pytree import tree_map

from neo_hf.attention_neo import find_key_runs, kernel_options_of

# Compute capability: bytes of shared memory that a block of threads may have.
TARGETS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
LENGTH = 512


def graphs_of_attention(dtype: torch.dtype, head_dim: int, options: dict | None) -> list:
    """The graphs (module, inputs) of the forward and the backward pass, traced on the CPU."""
    image = torch.arange(LENGTH) // 300
    mask = find_key_runs(torch.stack([image] * 3)[:, None]).block_mask
    query, key, value = (
        torch.randn(1, heads, LENGTH, width, dtype=dtype, requires_grad=True)
        for heads, width in ((4, 2 * head_dim), (2, 2 * head_dim), (2, head_dim))
    )
    graphs = []

    def keep(module, inputs):
        graphs.append((module, inputs))
        return module.forward

    torch._dynamo.reset()
    # On a CPU, FlexAttention refuses gradients.
    with patch.object(flex, "_validate_device", lambda *args: None):
        attend = torch.compile(flex.flex_attention, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        attend(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options).sum().backward()
    return graphs


def faked_card(stack: ExitStack, capability: int, shared_memory: int):
    """Make torch believe in a card."""
    import triton
    from triton.backends.compiler import GPUTarget

    major, minor = divmod(capability, 10)
    card = SimpleNamespace(
        major=major,
        minor=minor,
        name="faked",
        multi_processor_count=100,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=1536,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=2**35,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=shared_memory,
        L2_cache_size=2**25,
        gcnArchName="",
        is_integrated=0,
    )

    def replace(owner, **values):
        for name, value in values.items():
            stack.enter_context(patch.object(owner, name, value))

    known = {
        "get_device_properties": lambda device=None: card,
        "current_device": lambda: 0,
    }
    counted = known | {"device_count": lambda: 1}
    replace(torch.version, cuda="12.8")
    replace(
        torch.cuda,
        **counted,
        is_available=lambda: True,
        get_device_capability=lambda device=None: (major, minor),
        get_rng_state=lambda *args: torch.empty(0),
        set_rng_state=lambda *args: None,
        _lazy_init=lambda: None,
        _exchange_device=lambda index: 0,
        _maybe_exchange_device=lambda index: 0,
    )
    faked = device_interface.CudaInterface
    device_interface.init_device_reg()
    replace(faked, **{name: staticmethod(value) for name, value in counted.items()})
    replace(faked.Worker, **{name: staticmethod(value) for name, value in known.items()})
    for name in ("get_raw_stream", "exchange_device", "maybe_exchange_device"):
        replace(faked, **{name: staticmethod(lambda index: 0)})
    device_interface.register_interface_for_device("cuda", faked)
    device_interface.register_interface_for_device("cuda:0", faked)
    for value in list(vars(_triton).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    target = GPUTarget("cuda", capability, 32)
    driver = MagicMock()
    driver.get_current_target.return_value = target
    triton.runtime.driver.set_active(driver)
    replace(_triton, triton_hash_with_backend=lambda: "faked")
    replace(torch.Tensor, copy_=lambda self, *args, **kwargs: self)  # of strides, on tensors without values
    # The module around the kernels imports it.
    stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True))
    replace(triton_helpers, set_driver_to_gpu=lambda: None)
    replace(triton_heuristics.StaticTritonCompileResult, can_statically_launch=staticmethod(lambda *args: None))
    stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False))


def compile_kernels(capability: int, dtype: torch.dtype, head_dim: int = 128, own_options: bool = True) -> dict:
    """
    Bytes of shared memory of the kernels of the forward and the backward pass.

    Args:
        capability: of the card, a key of `TARGETS`.
        own_options: with `kernel_options_of` the card, else with PyTorch's defaults.
    """
    options = kernel_options_of(dtype, TARGETS[capability]) if own_options else None
    graphs = graphs_of_attention(dtype, head_dim, options)
    sources: list[tuple[str, str]] = []

    def collect(self, name, source, device_str="cuda"):
        sources.append((name, source))
        return MagicMock()

    needs = {}
    with ExitStack() as stack:
        faked_card(stack, capability, TARGETS[capability])
        stack.enter_context(patch.object(async_compile.AsyncCompile, "triton", collect))
        for step, (module, inputs) in zip(("forward", "backward"), graphs, strict=True):
            sources.clear()
            mode = FakeTensorMode(allow_non_fake_inputs=True)

            def on_card(x, mode=mode):
                if not isinstance(x, torch.Tensor):
                    return x
                with mode:
                    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

            for part in module.modules():
                for node in getattr(part, "graph", SimpleNamespace(nodes=())).nodes:
                    node.meta = {name: tree_map(on_card, value) for name, value in node.meta.items() if name == "val"}
                    if node.kwargs.get("device") is not None:
                        node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
                    if node.target in (
                        torch.ops.higher_order.flex_attention,
                        torch.ops.higher_order.flex_attention_backward,
                    ):
                        node.args = tuple(
                            {**x, "OUTPUT_LOGSUMEXP": True} if isinstance(x, dict) and "WRITE_DQ" in x else x
                            for x in node.args
                        )
            with tracing(TracingContext(mode)), V.set_fake_mode(mode):
                compile_fx_inner(module, [on_card(x) for x in inputs], is_backward=step == "backward")
            for name, source in sources:
                if "_tem_" in name:
                    kernel = getattr(codecache.PyCodeCache.load(source), name)
                    binary = kernel._precompile_config(kernel.configs[0]).kernel
                    needs[step] = max(needs.get(step, 0), binary.metadata.shared)
    return needs


if __name__ == "__main__":
    own = "--defaults" not in sys.argv
    for dtype in (torch.bfloat16, torch.float32):
        for capability, limit in TARGETS.items():
            needs = compile_kernels(capability, dtype, own_options=own)
            print(
                f"| sm_{capability} | {dtype} | {limit:,} | {needs['forward']:,} | {needs['backward']:,} |", flush=True
            )
