import logging
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from helpers import IMAGE, IMAGE_START, dense_mask_oracle, num_examples, one, random_model, random_prompt, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import DynamicCache, StaticCache
from transformers.integrations.flex_attention import flex_attention_forward

from neo_hf import allocate_position_ids, attention_neo
from neo_hf.attention_neo import (
    KeyRuns,
    TiledAttention,
    attend_by_sdpa,
    attend_one_query,
    find_key_runs,
    plan_attention,
)


@st.composite
def rows(draw):
    documents, grids = [], []
    for _ in range(draw(st.integers(1, 3))):
        images = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=2))
        ids, _, document_grids = random_prompt(torch.Generator().manual_seed(0), images, draw(st.integers(1, 3)))
        documents.append(ids.tolist())
        grids.append(document_grids)
    return documents, torch.cat(grids), draw(st.integers(0, 3)), draw(st.integers(0, 3))


def layout(batch, packed):
    """What `forward` takes for a batch of `rows`, and who is attended and sees whom."""
    length = max(left + sum(map(len, documents)) + right for documents, _, left, right in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.long)
    expected, attended, document_ids = [], [], []
    for number, (documents, _, left, _) in enumerate(batch):
        tokens = torch.tensor([token for ids in documents for token in ids])
        input_ids[number, left : left + len(tokens)] = tokens
        for found, value in zip(
            (expected, attended, document_ids), dense_mask_oracle(documents, length, left, packed), strict=True
        ):
            found.append(value)
    expected, attended = torch.stack(expected), torch.stack(attended)
    document_ids = torch.tensor(document_ids) if packed else None
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attended.long(),
        "image_grid_hw": torch.cat([grids for _, grids, _, _ in batch]),
    }
    return inputs | ({"document_ids": document_ids} if packed else {}), attended, expected


@settings(max_examples=num_examples(150))
@given(
    st.lists(rows(), min_size=1, max_size=3),
    st.sampled_from(["eager", "sdpa", "neo", "flex_attention"]),
    st.booleans(),
)
def test_mask(batch, implementation, packed):
    config = tiny_config().text_config
    config._attn_implementation = implementation
    inputs, attended, expected = layout(batch, packed)
    length = attended.shape[1]
    document_ids = inputs.get("document_ids")
    position_ids = allocate_position_ids(
        **inputs,
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
    )
    embeds = torch.empty(*attended.shape, 0)

    def compare(cache):
        _, mask = plan_attention(config, embeds, attended.long(), position_ids, cache, document_ids)
        if mask is None:
            found = torch.ones(length, length, dtype=torch.bool).tril().expand(expected.shape)
        elif isinstance(mask, KeyRuns):
            found = mask.dense()[:, 0]
            if implementation == "flex_attention":
                blocks = mask.block_mask
                assert torch.equal(
                    create_mask(blocks.mask_mod, len(batch), 1, *blocks.seq_lengths, device="cpu")[:, 0], found
                )
        else:
            found = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
            assert not found[..., length:].any()
        # What padding sees does not matter.
        assert torch.equal(found[..., :length] & attended[..., None], expected)

    compare(None)
    if not packed:
        compare(DynamicCache(config=config))
        compare(StaticCache(config=config, max_cache_len=length + 5))


@settings(max_examples=num_examples(25))
@given(st.lists(rows(), min_size=1, max_size=3), st.booleans(), st.integers(1, 5), st.integers(1, 9))
def test_same_logits_and_gradients(batch, packed, tile_size, key_block):
    inputs, attended, _ = layout(batch, packed)
    patches = int(inputs["image_grid_hw"].prod(-1).sum())
    inputs["pixel_values"] = torch.randn(patches, 768, generator=torch.Generator().manual_seed(1))
    model = random_model(tiny_config(text_config={"num_hidden_layers": 2}))
    torch.manual_seed(2)
    weights = torch.randn(*attended.shape, 512) * attended[..., None]

    def run(implementation):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        (logits * weights).sum().backward()
        return {"logits": logits[attended]} | {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = run("eager")
    with patch.multiple(attention_neo, TILE_SIZES=(tile_size, 2 * tile_size), KEY_BLOCK=key_block):
        for implementation in ("sdpa", "neo"):
            for name, found in run(implementation).items():
                if expected[name] is None or found is None:  # no images
                    assert (expected[name] is None) == (found is None)
                    continue
                scale = max(1, expected[name].abs().max().item())
                torch.testing.assert_close(found / scale, expected[name] / scale, rtol=0, atol=1e-4, msg=name)


def test_blocks_of_keys_with_large_scores():
    """Equal scores of ten million, of which blocks hold two and three: their number is not lost in rounding."""
    query, key = torch.full((1, 1, 5, 4), 5e3), torch.full((1, 1, 5, 4), 500.0)
    value = torch.tensor([1.0, 0, 0, 0, 0]).view(1, 1, 5, 1)
    runs = find_key_runs(torch.arange(5).expand(3, 1, 5))
    with patch.multiple(attention_neo, KEY_BLOCK=2):
        found = TiledAttention.apply(query, key, value, runs, 1.0)
    torch.testing.assert_close(found.flatten(), 1 / torch.arange(1.0, 6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_accuracy_in_bfloat16(sharpness):
    """
    About that of SDPA, which leaves the largest weight of a query exact; in scores of bfloat16 it would be four times
    as large.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(700)[None] % 120  # 14 tokens of text, an image of 106, and so on
    runs = find_key_runs(torch.stack([torch.where(places == 14, 1, (places < 14).long()).cumsum(-1)] * 3))
    shapes = ((4, 64), (2, 64), (2, 32))
    query, key, value = (torch.randn(1, n, 700, d, generator=generator).bfloat16() for n, d in shapes)
    query, scale = query * sharpness, 32**-0.5

    def error(output):
        return (output.double() - exact).square().mean().sqrt()

    exact = TiledAttention.apply(query.double(), key.double(), value.double(), runs, scale)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    sdpa, _ = attend_by_sdpa(module, query, key, value, runs.dense(), scaling=scale)
    assert error(TiledAttention.apply(query, key, value, runs, scale)) < 1.4 * error(sdpa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["with room to grow", "transposed", "rows of no whole width"])
@torch.no_grad()
def test_one_query(layout, dtype):
    """Keys and values are read where they are, whatever their layout."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, *shape, generator=generator) for shape in ((4, 1, 8), (2, 9, 8), (2, 9, 4)))
    seen = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    seen[1, ..., :4] = False
    weights = torch.softmax((query * 0.5 @ key.repeat_interleave(2, 1).mT).masked_fill(~seen, -torch.inf), -1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)

    def lay_out(x):
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        padding = (0, 0, 0, 5) if layout == "with room to grow" else (0, 3)
        return F.pad(x, padding, value=torch.nan)[:, :, : x.shape[2], : x.shape[3]]

    query, key, value = query.to(dtype), lay_out(key.to(dtype)), lay_out(value.to(dtype))
    found, _ = attend_one_query(None, query, key, value, seen, scaling=0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)


def test_padding_in_the_middle_of_a_row(model):
    """More than one run of keys per query: "neo" falls back on SDPA with a dense mask."""
    inputs = one(random_prompt(torch.Generator().manual_seed(7), [(2, 3)], text=5))
    inputs["attention_mask"][0, 2] = 0
    with torch.no_grad():
        found = model(**inputs).logits
        short = inputs | {name: inputs[name][:, [0, 1, *range(3, inputs[name].shape[1])]] for name in TOKENS}
        torch.testing.assert_close(found[:, 3:], model(**short).logits[:, 2:], rtol=0, atol=1e-4)


TOKENS = ("input_ids", "attention_mask")


@st.composite
def long_rows(draw, length, packed):
    """Document and image of each of `length` tokens, -1 for none, with padding on both sides."""
    documents, images = [-1] * min(draw(st.sampled_from([0, 5, 128])), length // 2), []
    images += documents
    stop = length - min(draw(st.sampled_from([0, 3, 140])), length // 3)
    while len(documents) < stop:
        size = draw(st.sampled_from([1, 7, 64, 128, 300]))
        documents += [len(documents) if packed and draw(st.booleans()) else max([*documents[-1:], 0])] * size
        images += [len(images) if draw(st.booleans()) else -1] * size
    return [(row[:stop] + [-1] * length)[:length] for row in (documents, images)]


@settings(max_examples=num_examples(60))
@given(st.data(), st.integers(2, 500), st.booleans(), st.sampled_from([0, 5, 128, 200]))
def test_block_mask(data, length, packed, cached):
    """To the block what `create_block_mask` finds by looking at each pair."""
    cached = 0 if packed else cached
    layouts = [data.draw(long_rows(length, packed)) for _ in range(data.draw(st.integers(1, 2)))]
    documents, images = torch.tensor(layouts).unbind(1)
    attended = F.pad(documents >= 0, (cached, 0), value=True)
    if cached:
        attended = attended & (documents[:, :1] >= 0)  # padding on the left covers the cached tokens
        attended[:, : cached // 2] = False
    document_of, image_of = (F.pad(x, (cached, 0), value=v) for x, v in ((documents, 0), (images, -1)))

    def sees(row, head, query, key):
        query = query + cached
        same_document = document_of[row, query] == document_of[row, key]
        same_image = (image_of[row, query] == image_of[row, key]) & (image_of[row, query] >= 0)
        return attended[row, query] & attended[row, key] & same_document & ((key <= query) | same_image)

    cache = None
    if cached:
        cache = DynamicCache(config=tiny_config().text_config)
        cache.update(*torch.zeros(2, len(layouts), 2, cached, 1), 0)
    # T indices that imply the images: equal within each, different between neighbours.
    starts = F.pad((images[:, 1:] != images[:, :-1]) | (images[:, 1:] < 0), (1, 0), value=True)
    temporal = starts.cumsum(-1)
    runs = find_key_runs(torch.stack([temporal] * 3), attended, documents if packed else None, cache)
    expected = create_block_mask(sees, len(layouts), None, length, cached + length, device="cpu")
    for found, wanted in zip(runs.block_mask.as_tuple(), expected.as_tuple(), strict=True):
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_equals_sdpa(head_dim, packed):
    """Compiles a kernel. FlexAttention has no backward pass on CPUs."""
    config = tiny_config(text_config={"head_dim": head_dim, "num_hidden_layers": 2})
    model = random_model(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(5)
    prompts = [random_prompt(generator, images) for images in ([(3, 5), (2, 2)], [(4, 4)], [])]
    ids, pixels, grids = (torch.cat(parts) for parts in zip(*prompts, strict=True))
    inputs = one((ids, pixels, grids))
    if packed:
        del inputs["attention_mask"]
        lengths = torch.tensor([len(prompt[0]) for prompt in prompts])
        inputs["document_ids"] = torch.arange(3).repeat_interleave(lengths)[None]
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_flex_attention_generates():
    """The prompt by FlexAttention, then single tokens by SDPA."""
    model = random_model(tiny_config(text_config={"head_dim": 64, "num_hidden_layers": 2}), attn_implementation="sdpa")
    inputs = one(random_prompt(torch.Generator().manual_seed(6), [(3, 5), (2, 2)]))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **settings)
    model.set_attn_implementation("flex_attention")
    assert torch.equal(model.generate(**inputs, **settings), expected)


@pytest.mark.slow
def test_flex_attention_compiles_for_all_lengths():
    """Once for the first length, once for lengths that differ, and never again."""
    config = tiny_config(text_config={"head_dim": 64, "num_hidden_layers": 1})
    model = random_model(config, attn_implementation="flex_attention")
    prompts = [random_prompt(torch.Generator().manual_seed(8), [(3, 5)] * n) for n in (8, 10, 13, 25)]
    with torch.no_grad():
        for prompt in prompts[:2]:
            model(**one(prompt))
        with torch.compiler.set_stance("fail_on_recompile"):
            for prompt in prompts[2:]:
                model(**one(prompt))


def test_without_a_compiler(monkeypatch, caplog):
    """FlexAttention would make the scores of all pairs: SDPA with a dense mask takes its place, and says so."""
    monkeypatch.setattr(attention_neo.shutil, "which", lambda name: None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = random_model(tiny_config(), attn_implementation="sdpa")
    inputs = one(random_prompt(torch.Generator().manual_seed(6), [(2, 3)]))
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flex_attention")
        attention_neo.can_compile_kernels.cache_clear()
        try:
            assert torch.equal(model(**inputs).logits, expected)
        finally:
            attention_neo.can_compile_kernels.cache_clear()
    assert "needs a C++ compiler" in caplog.text


@pytest.mark.gpu
def test_flex_attention_is_the_default_on_cuda():
    """Same logits and gradients as with a dense mask, for two packed documents with images across blocks."""
    model = random_model(tiny_config(text_config={"head_dim": 128, "num_hidden_layers": 2})).cuda()
    prompts = [random_prompt(torch.Generator().manual_seed(9), [(20, 30), (9, 9)], text=40) for _ in range(2)]
    ids, pixels, grids = (torch.cat(parts).cuda() for parts in zip(*prompts, strict=True))
    inputs = {"input_ids": ids[None], "pixel_values": pixels, "image_grid_hw": grids}
    inputs["document_ids"] = torch.arange(2, device="cuda").repeat_interleave(len(ids) // 2)[None]
    found = {}
    for implementation in ("neo", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with patch.object(attention_neo, "flex_attention_forward", wraps=flex_attention_forward) as flex:
            logits = model(**inputs).logits
        assert flex.called == (implementation == "neo")
        logits.square().mean().backward()
        found[implementation] = [logits, *(parameter.grad for parameter in model.parameters())]
    torch.testing.assert_close(found["neo"], found["sdpa"], rtol=1e-3, atol=1e-4)


FLEX_MASK = """
import resource
import torch
from neo_hf import NeoTextConfig
from neo_hf.attention_neo import find_key_runs

config = NeoTextConfig(num_hidden_layers=1)
config._attn_implementation = "flex_attention"
peaks = []
for length in (1024, 2048, 32_768):  # the first two compile
    temporal = torch.arange(length) // 64  # images of 64 tokens
    position_ids = torch.stack([temporal] * 3)[:, None]
    mask = find_key_runs(position_ids).block_mask
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(mask.sparsity(), peaks[-1] - peaks[-2])
"""


@pytest.mark.slow
def test_flex_attention_has_no_dense_mask():
    """Of 32K tokens, one bit in a byte each, that would be a gigabyte."""
    run = subprocess.run([sys.executable, "-c", FLEX_MASK], capture_output=True, text=True, check=True)
    sparsity, kilobytes = map(float, run.stdout.split())
    assert 49 < sparsity < 50  # per cent: nothing but the blocks above the diagonal
    assert kilobytes < 100_000
