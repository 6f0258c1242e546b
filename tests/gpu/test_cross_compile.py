"""FlexAttention's kernels, compiled for cards that are not there, fit their shared memory."""

import pytest
import torch

pytest.importorskip("triton", reason="cross-compilation needs the triton package")

from cross_compile import TARGETS, compile_kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_fit(capability, dtype):
    needs = compile_kernels(capability, dtype)
    assert set(needs) == {"forward", "backward"}
    assert max(needs.values()) <= TARGETS[capability], needs
