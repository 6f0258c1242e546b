import subprocess
import sys

import pytest
import torch
from conftest import IMAGE, IMAGE_START, one, random_model, random_prompt, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from neo_hf import allocate_position_ids
from neo_hf.masking_neo import create_neo_mask


def oracle(row, length, left, packed):
    """Who sees whom (length, length), pair by pair, and who is there. `row`: documents of (ids, token counts)."""
    there, document_of, picture_of = [False] * left, [None] * left, [None] * left
    for document, ids in enumerate(row):
        picture = None
        for i, token in enumerate(ids):
            if token == IMAGE_START:
                picture = (document, i)
            there.append(True)
            document_of.append(document if packed else 0)
            picture_of.append(picture if token == IMAGE else None)
    rest = length - len(there)
    there, document_of, picture_of = there + [False] * rest, document_of + [None] * rest, picture_of + [None] * rest
    sees = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            same_picture = picture_of[q] is not None and picture_of[q] == picture_of[k]
            sees[q, k] = there[q] and there[k] and document_of[q] == document_of[k] and (k <= q or same_picture)
    # Padding may carry the number of a document next to it.
    return sees, torch.tensor(there), [d or 0 for d in document_of]


@st.composite
def rows(draw):
    documents, grids = [], []
    for _ in range(draw(st.integers(1, 3))):
        pictures = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=2))
        ids, _, document_grids = random_prompt(torch.Generator().manual_seed(0), pictures, draw(st.integers(1, 3)))
        documents.append(ids.tolist())
        grids.append(document_grids)
    return documents, torch.cat(grids), draw(st.integers(0, 3)), draw(st.integers(0, 3))


@settings(deadline=None, max_examples=150)
@given(st.lists(rows(), min_size=1, max_size=3), st.sampled_from(["eager", "sdpa"]), st.booleans())
def test_mask(batch, implementation, packed):
    config = tiny_config().text_config
    config._attn_implementation = implementation
    length = max(left + sum(map(len, documents)) + right for documents, _, left, right in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.long)
    expected, there, document_ids = [], [], []
    for number, (documents, _, left, _) in enumerate(batch):
        tokens = torch.tensor([token for ids in documents for token in ids])
        input_ids[number, left : left + len(tokens)] = tokens
        for found, value in zip((expected, there, document_ids), oracle(documents, length, left, packed), strict=True):
            found.append(value)
    expected, there = torch.stack(expected), torch.stack(there)
    document_ids = torch.tensor(document_ids) if packed else None
    position_ids = allocate_position_ids(
        input_ids,
        torch.cat([grids for _, grids, _, _ in batch]),
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        attention_mask=there,
        document_ids=document_ids,
    )
    embeds = torch.empty(*input_ids.shape, 0)

    def compare(cache):
        mask = create_neo_mask(config, embeds, there.long(), cache, position_ids, document_ids)
        if mask is None:
            found = torch.ones(length, length, dtype=torch.bool).tril().expand(expected.shape)
        else:
            found = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
            assert not found[..., length:].any()
        # What padding sees does not matter.
        assert torch.equal(found[..., :length] & there[..., None], expected)

    compare(None)
    if not packed:
        compare(DynamicCache(config=config))
        compare(StaticCache(config=config, max_cache_len=length + 5))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_equals_sdpa(head_dim, packed):
    """Compiles a kernel. FlexAttention has no backward pass on CPUs."""
    config = tiny_config(text_config={"head_dim": head_dim, "num_hidden_layers": 2})
    model = random_model(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(5)
    prompts = [random_prompt(generator, pictures) for pictures in ([(3, 5), (2, 2)], [(4, 4)], [])]
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


FLEX_MASK = """
import resource
import torch
from neo_hf import NeoTextConfig
from neo_hf.masking_neo import create_neo_mask

config = NeoTextConfig(num_hidden_layers=1)
config._attn_implementation = "flex_attention"
peaks = []
for length in (1024, 2048, 32_768):  # the first two compile
    temporal = torch.arange(length) // 64  # pictures of 64 tokens
    position_ids = torch.stack([temporal] * 3)[:, None]
    mask = create_neo_mask(config, torch.empty(1, length, 0), None, None, position_ids)
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
