import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import batch, num_examples, one, random_prompt
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import StaticCache
from transformers.cache_utils import DynamicLayer

from neo_hf.cache_neo import GrowingLayer, NeoCache

OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 2, 150])),
    st.tuples(st.sampled_from(["crop", "fork", "swap", "reorder", "deepcopy", "reset"]), st.just(1)),
)


@settings(max_examples=num_examples(100))
@given(st.lists(OPERATIONS, max_size=12))
@example([("fork", 1), ("update", 1), ("swap", 1), ("update", 1)])
@example([("fork", 1), ("crop", 1), ("update", 1)])
@torch.no_grad()
def test_holds_what_a_dynamic_layer_holds(operations):
    generator = torch.Generator().manual_seed(0)
    pairs = [(GrowingLayer(), DynamicLayer())]  # the first is in use, the others share its past
    for operation, size in [("update", 3), *operations]:
        used = pairs[0]
        if operation == "update":
            states = torch.randn(2, 2, 3, size, 4, generator=generator)
            found, expected = (layer.update(states[0], states[1, ..., :2]) for layer in used)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        elif operation == "fork":
            pairs.append(tuple(copy.copy(layer) for layer in used))
        elif operation == "swap":
            pairs.reverse()
        elif operation == "deepcopy":
            pairs[0] = copy.deepcopy(used)
        else:
            for layer in used:
                if operation == "crop" and layer.get_seq_length():
                    layer.crop(-1)
                elif operation == "reorder":
                    layer.reorder_cache(torch.tensor([1, 1]))
                elif operation == "reset" and layer.is_initialized:
                    layer.reset()
        for found, expected in pairs:
            assert found.get_seq_length() == expected.get_seq_length()
            if found.get_seq_length():
                assert torch.equal(found.keys, expected.keys)
                assert torch.equal(found.values, expected.values)


def test_gradients_pass_through(model):
    inputs = one(random_prompt(torch.Generator().manual_seed(1), [(2, 3)]))
    cache = NeoCache(model.config.text_config)
    model(**inputs, past_key_values=cache)
    token = torch.tensor([[7]])
    model(input_ids=token, past_key_values=cache).logits.sum().backward()
    embedding = model.get_input_embeddings()
    assert embedding.weight.grad[inputs["input_ids"][0, 0]].abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_step_waits_for_nothing(model, kind, monkeypatch):
    """Nothing is read back from the device, and with a static cache it compiles to one graph."""
    if model.config._attn_implementation == "eager":
        pytest.skip("the reference")
    prompt = one(random_prompt(torch.Generator().manual_seed(2), [(2, 3)]))
    attention_mask = torch.cat([prompt["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
    length = attention_mask.shape[1] - 1
    token, position_ids = torch.tensor([[7]]), torch.tensor([length, 0, 0])[:, None, None]

    def prefilled():
        config = model.config.text_config
        cache = NeoCache(config) if kind == "growing" else StaticCache(config=config, max_cache_len=64)
        model(**prompt, past_key_values=cache)
        return cache

    with torch.no_grad():
        whole = {"input_ids": torch.cat([prompt["input_ids"], token], dim=1), "attention_mask": attention_mask}
        t = model.model.get_position_ids(prompt["input_ids"], prompt["image_grid_hw"])
        whole["position_ids"] = torch.cat([t, position_ids], dim=-1)
        expected = model(**prompt | whole).logits[:, -1:]
        step = {"input_ids": token, "attention_mask": attention_mask, "position_ids": position_ids}
        if kind == "static":
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(**step, past_key_values=prefilled()).logits, expected)
        cache = prefilled()

        def refuse(*args):
            raise AssertionError("a decoding step reads a tensor back")

        with monkeypatch.context() as patched:
            for name in ("item", "tolist", "__bool__", "__int__", "__index__", "__float__"):
                patched.setattr(torch.Tensor, name, refuse)
            found = model(**step, past_key_values=cache).logits
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_copies_in_threads_keep_their_own():
    """Two copies that take the next place at the same time: one of them moves to buffers of its own."""
    for _ in range(50):
        layer = GrowingLayer()
        layer.update(torch.zeros(1, 2, 64, 32), torch.zeros(1, 2, 64, 32))
        barrier = threading.Barrier(2)

        def add(number, layer=layer, barrier=barrier):
            fork, states = copy.copy(layer), torch.full((1, 2, 64, 32), float(number))
            barrier.wait()
            fork.update(states, states)
            return fork.keys[:, :, 64:].unique().tolist()

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(add, (1, 2))) == [[1.0], [2.0]]


@torch.no_grad()
def test_selected_rows_move_to_buffers_of_their_own():
    layer, reference = GrowingLayer(), DynamicLayer()
    states = torch.randn(3, 2, 4, 8)
    for x in (layer, reference):
        x.update(states, states)
        x.batch_select_indices(slice(0, 2))
        x.update(states[:2], states[:2])
    assert torch.equal(layer.keys, reference.keys)


@torch.no_grad()
def test_indices_follow_reordered_rows(model):
    """Rows of a cache that trade places take along where their T index goes on."""
    generator = torch.Generator().manual_seed(3)
    prompts = [random_prompt(generator, [(2, 3)]), random_prompt(generator, [(1, 2), (4, 4)])]
    inputs, cache = batch(prompts), NeoCache(model.config.text_config)
    model(**inputs, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    token = torch.tensor([[7], [8]])
    mask = F.pad(inputs["attention_mask"].flip(0), (0, 1), value=1)
    found = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
    whole = batch([(torch.cat([prompts[i][0], t]), *prompts[i][1:]) for i, t in zip((1, 0), token, strict=True)])
    torch.testing.assert_close(found, model(**whole).logits[:, -1:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_token_by_token(model):
    """A row whose first steps are padding alone leaves nothing in the cache that is not a number."""
    prompts = [random_prompt(torch.Generator().manual_seed(i), [], text=length) for i, length in enumerate((6, 3))]
    inputs, cache = batch(prompts), NeoCache(model.config.text_config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    steps = [
        model(
            input_ids=ids[:, i : i + 1],
            attention_mask=mask[:, : i + 1],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, i : i + 1],
            past_key_values=cache,
        ).logits
        for i in range(6)
    ]
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(steps, 1)[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)
