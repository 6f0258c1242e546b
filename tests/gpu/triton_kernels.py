"""
FlexAttention's Triton kernels without a card: inductor generates them on a faked CUDA device, and Triton compiles them
for any target or runs them in its interpreter.

Needs the triton package of the torch that is installed. What this does to torch and Triton lasts as long as the
process: use `fresh_processes`.

    python tests/gpu/triton_kernels.py [--defaults]

prints what the kernels need on each card, with the options that the project chooses or with PyTorch's own.
"""

import argparse
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
import torch._dynamo.device_interface as device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext, tracing
from torch._inductor import async_compile, codecache, config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.virtualized import V
from torch.nn.attention import flex_attention
from torch.utils import _triton
from torch.utils._pytree import tree_map
from tqdm import tqdm

from neo_hf.attention_neo import attend_by_blocks, find_key_runs, kernel_options_of

# Compute capability: bytes of shared memory that a block of threads may have.
TARGETS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@contextmanager
def fresh_processes(**environment: str):
    """
    A pool that runs each function in a new process without GPUs, with these variables in its environment. Inductor
    remembers the card for as long as a process lives.
    """
    with (
        patch.dict(os.environ, environment, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        yield pool


def faked_card(stack: ExitStack, capability: int):
    """Make inductor and Triton believe in a card of this compute capability."""
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
        shared_memory_per_block_optin=TARGETS[capability],
        L2_cache_size=2**25,
        gcnArchName="",
        is_integrated=0,
    )

    def replace(owner, **values):
        for name, value in values.items():
            stack.enter_context(patch.object(owner, name, value))

    known = {"get_device_properties": lambda device=None: card, "current_device": lambda: 0}
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
    driver = MagicMock()
    driver.get_current_target.return_value = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(driver)
    replace(_triton, triton_hash_with_backend=lambda: "faked")
    replace(torch.Tensor, copy_=lambda self, *args, **kwargs: self)  # of strides, on tensors without values
    # The module around the kernels imports these.
    stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True))
    replace(torch._C._dynamo.guards, _empty_strided_cuda=torch._C._dynamo.guards._empty_strided_cpu)
    replace(triton_helpers, set_driver_to_gpu=lambda: None)
    replace(triton_heuristics.StaticTritonCompileResult, can_statically_launch=staticmethod(lambda *args: None))
    stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False))


def compile_on_card(module, inputs, capability: int, make_kernel: Callable[[str, str], object], is_backward: bool):
    """
    Compile a graph traced on the CPU as inductor would on the card.

    Args:
        make_kernel: called with name and source of each Triton kernel; what it returns is called in its place.

    Returns:
        The compiled graph. It runs on tensors in host memory, if the kernels do.
    """
    mode = detect_fake_mode(inputs)

    def on_card(x):
        if not isinstance(x, torch.Tensor):
            return x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

    with ExitStack() as stack:
        faked_card(stack, capability)
        triton = staticmethod(lambda name, source, device_str="cuda": make_kernel(name, source))
        stack.enter_context(patch.object(async_compile.AsyncCompile, "triton", triton))
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
            return compile_fx_inner(module, [on_card(x) for x in inputs], is_backward=is_backward)


@contextmanager
def attention_on_card(capability: int, make_kernel: Callable[[str, str], object]):
    """`attend_by_blocks` compiles for the card, on tensors in host memory, and runs what `make_kernel` returns."""

    def compiler(module, inputs, is_backward=False):
        graph = compile_on_card(module, inputs, capability, make_kernel, is_backward)

        def run(*args):
            with patch("torch.cuda._DeviceGuard"), patch("torch.cuda.set_device"):
                return graph(list(args))

        return make_boxed_func(run)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=partial(compiler, is_backward=True))
    attend = torch.compile(flex_attention.flex_attention, backend=backend)
    with ExitStack() as stack:
        # On a CPU, FlexAttention refuses gradients.
        stack.enter_context(patch.object(flex_attention, "_validate_device", lambda *args: None))
        name = "transformers.integrations.flex_attention.WrappedFlexAttention"
        stack.enter_context(patch(name, lambda training: lambda: attend))
        yield
    torch._dynamo.reset()


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread that spill to local memory."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    return found["REG"], found["STACK"]


def compile_kernels(capability: int, dtype: torch.dtype, own_options: bool = True, head_dim: int = 128) -> dict:
    """
    What the kernels of the forward and the backward pass need, the largest of both forms they are compiled in: for one
    length, and for any length and padding.

    Args:
        capability: of the card, a key of `TARGETS`.
        own_options: with `kernel_options_of` the card, else with PyTorch's defaults.

    Returns:
        "forward" and "backward": (bytes of shared memory, registers per thread, bytes of spills per thread).
    """
    options = kernel_options_of(dtype, TARGETS[capability], divmod(capability, 10)) if own_options else None
    needs: dict[str, tuple[int, ...]] = {}

    def collect(name, source):
        kernel = getattr(codecache.PyCodeCache.load(source), name)
        if "_tem_" in name:  # FlexAttention's template; the rest is pointwise
            binary = kernel._precompile_config(kernel.configs[0]).kernel
            assert binary.metadata.target.arch == capability
            step = "backward" if "arg_DELTA" in source else "forward"
            need = binary.metadata.shared, *resources(binary.asm["cubin"])
            needs[step] = tuple(map(max, need, needs.get(step, need)))
        return MagicMock()

    with attention_on_card(capability, collect):
        for length, has_gap in ((512, False), (700, True)):
            image = torch.arange(length) // 300
            mask = torch.ones(1, length, dtype=torch.long)
            mask[0, 20] = 1 - has_gap
            runs = find_key_runs(torch.stack([image] * 3)[:, None], mask)
            query, key, value = (
                torch.randn(1, heads, length, width, dtype=dtype, requires_grad=True)
                for heads, width in ((4, 2 * head_dim), (2, 2 * head_dim), (2, head_dim))
            )
            module = SimpleNamespace(training=True)
            output, _ = attend_by_blocks(module, query, key, value, runs, 1.0, kernel_options=options)
            output.sum().backward()
    return needs


class InterpretedKernel:
    """A Triton kernel that runs in the interpreter of Triton, in a process with `TRITON_INTERPRET=1`."""

    def __init__(self, name: str, source: str):
        # The decorators between inductor and Triton compile and tune.
        source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", source, flags=re.DOTALL)
        self.kernel = getattr(codecache.PyCodeCache.load(source), name)

    def run(self, *args, stream):
        names = list(inspect.signature(self.kernel.fn).parameters)
        blocks = [name for name in names if name.endswith("BLOCK")]
        if blocks:  # no template: the launcher would choose blocks and derive the grid
            grid = (-(-args[names.index("xnumel")] // 64),)
            self.kernel[grid](*args, **dict.fromkeys(blocks, 64))
        else:
            *args, x, y, z = args
            self.kernel[x, y, z](*args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defaults", action="store_true", help="PyTorch's own options")
    arguments = parser.parse_args()
    print("| card | dtype | limit | forward | backward |\n| --- | --- | --- | --- | --- |")
    cells = [(dtype, card) for dtype in (torch.bfloat16, torch.float16, torch.float32) for card in TARGETS]
    with fresh_processes() as pool:
        for dtype, card in tqdm(cells, file=sys.stderr):
            needs = pool.submit(compile_kernels, card, dtype, not arguments.defaults).result()
            row = [f"sm_{card}", str(dtype).removeprefix("torch."), f"{TARGETS[card]:,}"]
            for step in ("forward", "backward"):
                shared, registers, spills = needs[step]
                row.append(f"{shared:,} B, {registers} registers, {spills} B spilt")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
