"""FlexAttention's Triton kernels without a card: they fit six cards, and equal eager in Triton's interpreter."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import IMAGE, IMAGE_START, dense_mask_oracle, random_prompt
from transformers import DynamicCache
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from neo_hf.attention_neo import attend_by_blocks, find_key_runs, kernel_options_of
from neo_hf.indexing_neo import allocate_position_ids

pytest.importorskip("triton", reason="needs the triton package: make test-gpu-offline installs it")
from triton_kernels import TARGETS, InterpretedKernel, attention_on_card, compile_kernels, fresh_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiler():
    with fresh_processes() as pool:
        yield pool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_fit(compiler, capability, dtype):
    needs = compiler.submit(compile_kernels, capability, dtype).result()
    assert set(needs) == {"forward", "backward"}
    assert max(shared for shared, *_ in needs.values()) <= TARGETS[capability], needs


def draw_layout(kind, generator):
    """Two rows of two turns with images: their runs, and pair by pair which of L queries sees which of S keys."""

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def turn():
        grids = [(number(1, 7), number(1, 12)) for _ in range(number(1, 4))]
        return random_prompt(generator, grids, text=number(1, 24))

    turns = [turn(), turn()]
    # Rows of the same length have the same turns in another order.
    rows = [turns, turns[::-1] if kind in ("images", "documents") else [turn(), turn()]]
    first, second = (max(len(row[i][0]) for row in rows) for i in (0, 1))
    whole = max(len(a[0]) + len(b[0]) for a, b in rows)
    num_cached = first if "cached" in kind else 0
    num_keys = first + second if num_cached else whole
    token_ids = torch.zeros(2, num_keys, dtype=torch.long)
    attention_mask, document_ids = torch.zeros_like(token_ids), torch.zeros_like(token_ids)
    seen = torch.zeros(2, num_keys, num_keys, dtype=torch.bool)
    for row, (a, b) in enumerate(rows):
        sizes = len(a[0]), len(b[0])
        start = {"left padding": num_keys - sum(sizes), "left padding, cached": first - sizes[0]}.get(kind, 0)
        places = torch.arange(sum(sizes)) + start
        if num_cached:
            places[sizes[0] :] = first + torch.arange(sizes[1])
        ids = torch.cat([a[0], b[0]])
        token_ids[row, places], attention_mask[row, places] = ids, 1
        document_ids[row, places[sizes[0] :]] = 1
        packed = kind == "documents"
        documents = [a[0].tolist(), b[0].tolist()] if packed else [ids.tolist()]
        seen[row, places[:, None], places] = dense_mask_oracle(documents, len(ids), 0, packed)[0]

    grids = torch.cat([grids for row in rows for _, _, grids in row])
    position_ids = allocate_position_ids(
        token_ids,
        grids,
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        spatial_merge_size=2,
        attention_mask=attention_mask,
        document_ids=document_ids if kind == "documents" else None,
    )
    cache = None
    if num_cached:
        cache = DynamicCache()
        cache.update(torch.zeros(2, 1, num_cached, 1), torch.zeros(2, 1, num_cached, 1), 0)
    runs = find_key_runs(
        position_ids[..., num_cached:], attention_mask, document_ids if kind == "documents" else None, cache
    )
    return runs, seen[:, num_cached:]


KINDS = [
    "images",
    "documents",
    "left padding",
    "right padding",
    "left padding, cached",
    "padding between turns, cached",
]


def differences(number, capability, device="cpu"):
    """
    The largest differences to eager of outputs and of gradients, over a number of layouts of each kind, in float32 but
    with the blocks of bfloat16. On a CPU the kernels are interpreted.
    """
    generator = torch.Generator().manual_seed(0)
    module = SimpleNamespace(training=True, num_key_value_groups=2)
    options = kernel_options_of(torch.bfloat16, TARGETS[capability], divmod(capability, 10))
    worst = {}
    with attention_on_card(capability, InterpretedKernel) if device == "cpu" else nullcontext():
        for kind in KINDS * number:
            runs, seen = (x.to(device) for x in draw_layout(kind, generator))
            shapes = [(2, 2, seen.shape[1], 32), (2, 1, seen.shape[2], 32), (2, 1, seen.shape[2], 16)]
            inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
            is_real = seen.any(-1)[..., None, None]  # padding sees nothing
            grad = torch.randn(2, seen.shape[1], 2, 16, generator=generator).to(device) * is_real
            mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
            expected, _ = eager_attention_forward(module, *inputs, mask[:, None], scaling=0.25)
            output, _ = attend_by_blocks(module, *inputs, runs, 0.25, kernel_options=options)
            grads = (torch.autograd.grad(x, inputs, grad) for x in (output, expected))
            forward = float(((output - expected) * is_real).detach().abs().max())
            backward = max(float((x - y).abs().max()) for x, y in zip(*grads, strict=True))
            worst[kind] = tuple(map(max, (forward, backward), worst.get(kind, (0.0, 0.0))))
    return worst


@pytest.mark.parametrize("capability", [89, 90])
def test_interpreted_kernels_equal_eager(capability):
    with fresh_processes(TRITON_INTERPRET="1") as pool:
        worst = pool.submit(differences, 5, capability).result()
    print(worst)
    assert max(forward for forward, _ in worst.values()) <= 2e-6
    assert max(backward for _, backward in worst.values()) <= 1e-5


@pytest.mark.gpu
def test_kernels_equal_eager_on_a_card():
    major, minor = torch.cuda.get_device_capability()
    worst = differences(9, 10 * major + minor, "cuda")
    assert max(forward for forward, _ in worst.values()) <= 1e-5
    assert max(backward for _, backward in worst.values()) <= 1e-4
