"""Every way to generate gives the tokens of the plain way."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import IMAGE, IMAGE_END, IMAGE_START, batch, one, random_model, random_prompt, tiny_config
from transformers import DynamicCache, StaticCache

from neo_hf.cache_neo import NeoCache

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [
        random_prompt(generator, [(2, 3)]),
        random_prompt(generator, [], text=11),
        random_prompt(generator, [(1, 4), (3, 2)], text=2),
        random_prompt(generator, [(1, 1)], text=5),
    ]


def new_tokens(model, inputs, **kwargs):
    return model.generate(**inputs, **GREEDY, **kwargs)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return torch.cat([new_tokens(model, one(prompt)) for prompt in prompts])


def test_answers_depend_on_prompts(expected):
    assert len({tuple(row) for row in expected.tolist()}) == len(expected)
    assert all(len(set(row)) > 3 for row in expected.tolist())


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_batch(model, prompts, expected, use_cache):
    assert torch.equal(new_tokens(model, batch(prompts), use_cache=use_cache), expected)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams(model, prompts, kwargs):
    alone = torch.cat([new_tokens(model, one(prompt), **kwargs) for prompt in prompts])
    assert torch.equal(new_tokens(model, batch(prompts), **kwargs), alone)
    assert torch.equal(new_tokens(model, batch(prompts), use_cache=False, **kwargs), alone)


def test_num_return_sequences(model, prompts, expected):
    # Top-k sampling from one token is greedy, but goes through the expansion of images.
    inputs = batch(prompts)
    output = model.generate(**inputs, **{**GREEDY, "do_sample": True}, top_k=1, num_return_sequences=3)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert torch.equal(output, expected.repeat_interleave(3, dim=0))


def test_static_cache(model, prompts, expected):
    assert torch.equal(
        new_tokens(model, batch(prompts), cache_implementation="static", disable_compile=True), expected
    )


def test_prompt_lookup(model, prompts, expected):
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(new_tokens(model, one(prompt), prompt_lookup_num_tokens=3)[0], tokens)


def test_assisted(model, prompts, expected):
    assistant = copy.deepcopy(model)
    with torch.no_grad():  # mostly right, so that drafts are both accepted and rejected
        assistant.lm_head.weight.add_(0.1 * torch.randn_like(assistant.lm_head.weight))
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(new_tokens(model, one(prompt), assistant_model=assistant)[0], tokens)


def test_inputs_embeds(model, prompts, expected):
    for prompt, tokens in zip(prompts, expected, strict=True):
        inputs = one(prompt)
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        # Placeholders that are not yet filled in are found by their embedding.
        assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **GREEDY)[0], tokens)


def test_inputs_embeds_with_visual_tokens(model, prompts, expected):
    for prompt, tokens in zip(prompts, expected, strict=True):
        inputs = one(prompt)
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values", None)
        embeds = model.get_input_embeddings()(ids)
        grids = inputs.pop("image_grid_hw", None)
        if pixels is not None:
            embeds[ids == IMAGE] = torch.cat(model.get_image_features(pixels, grids).pooler_output)
        position_ids = model.model.get_position_ids(ids, grids)
        output = model.generate(inputs_embeds=embeds, position_ids=position_ids, **inputs, **GREEDY)
        assert torch.equal(output[0], tokens)


def test_mm_encoder_outputs(model, prompts, expected):
    inputs = batch(prompts)
    features = model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_hw"])
    assert torch.equal(new_tokens(model, inputs, mm_encoder_outputs={"image": features}), expected)


def conversation():
    generator = torch.Generator().manual_seed(2)
    return [random_prompt(generator, images) for images in ([(2, 2)], [(1, 3), (2, 1)], [])]


def joined(turns):
    ids, pixels, grids = zip(*turns, strict=True)
    return torch.cat(ids), torch.cat(pixels), torch.cat(grids)


@pytest.mark.parametrize("given", ["all", "new images", "new tokens"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_continue_from_cache(model, given, kind):
    turns = conversation()
    static = StaticCache(config=model.config.text_config, max_cache_len=128)
    cache = DynamicCache(config=model.config.text_config) if kind == "dynamic" else static
    so_far = []
    for turn in turns:
        whole = joined([*so_far, turn])
        expected = model.generate(**one(whole), **GREEDY)
        inputs = one(whole)
        if so_far and given != "all":
            inputs = one(turn) | {"input_ids": whole[0][None], "attention_mask": inputs["attention_mask"]}
            if given == "new tokens":
                inputs["input_ids"] = whole[0][None, cache.get_seq_length() :]
        output = model.generate(**inputs, **GREEDY, past_key_values=cache, disable_compile=True)
        answer = expected[0, len(whole[0]) :]
        assert torch.equal(output[0, -len(answer) :], answer)
        so_far = [*so_far, turn, (answer, *random_prompt(torch.Generator(), [])[1:])]


def test_chunked_prefill(model, prompts, expected):
    # <img> at 3, visual tokens 4 to 9. A chunk may end behind the image, not within.
    inputs = one(prompts[0])
    for size in (10, 11):
        assert torch.equal(new_tokens(model, inputs, prefill_chunk_size=size)[0], expected[0])
    with pytest.raises(ValueError, match=r"prefill_chunk_size=6 .* row 0 between tokens 5 and 6"):
        new_tokens(model, inputs, prefill_chunk_size=6)
    for size in (3, 7):  # text may be cut anywhere
        assert torch.equal(new_tokens(model, one(prompts[1]), prefill_chunk_size=size)[0], expected[1])


def test_adjacent_images_may_be_cut_between():
    model = random_model(tiny_config())
    prompt = random_prompt(torch.Generator().manual_seed(3), [(1, 2), (2, 2)], text=0)  # <img> 2 </img> <img> 4 </img>
    assert torch.equal(new_tokens(model, one(prompt), prefill_chunk_size=5), new_tokens(model, one(prompt)))


def test_step_by_step_without_position_ids(model, prompts, expected):
    """A hand-written loop on `forward`: the cache knows where its sequence stands."""
    for prompt, tokens in zip(prompts, expected, strict=True):
        inputs = one(prompt)
        with torch.no_grad():
            outputs = model(**inputs, use_cache=True)
            found = []
            for _ in tokens:
                found.append(outputs.logits[:, -1].argmax(-1))
                outputs = model(input_ids=found[-1][:, None], past_key_values=outputs.past_key_values)
        assert torch.equal(torch.cat(found), tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_halves_equal_the_whole(model, prompts, side):
    inputs = batch(prompts, side)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        whole = model(**inputs).logits
        # Text after the images, in two more steps on the cache.
        more = torch.arange(8).reshape(4, 2)
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
        longer["attention_mask"] = torch.cat([mask, torch.ones_like(more)], 1)
        expected = model(**longer).logits[:, -2:]
        outputs = model(**inputs, use_cache=True)
        torch.testing.assert_close(outputs.logits[mask == 1], whole[mask == 1], rtol=0, atol=1e-5)
        outputs = model(
            input_ids=more, attention_mask=longer["attention_mask"], past_key_values=outputs.past_key_values
        )
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-4)


def test_threads_share_a_model(model, prompts, expected):
    """Nothing about a sequence is kept on the model."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: new_tokens(model, one(prompt))[0], prompts * 3))
    assert torch.equal(torch.stack(found), expected.repeat(3, 1))


def test_cut_behind_image_start(model):
    """Chunks that end just behind `<img>`, with or without an image after it, count on as the whole does."""
    ids = torch.tensor([[7, 8, 502, 501, 501, 503, 9, 502, 10, 11]])
    pixels, grid = torch.randn(8, 768, generator=torch.Generator().manual_seed(4)), torch.tensor([[2, 4]])
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels, image_grid_hw=grid).logits
        cache = DynamicCache(config=model.config.text_config)
        parts = []
        for part in (ids[:, :3], ids[:, 3:8], ids[:, 8:]):
            images = {"pixel_values": pixels, "image_grid_hw": grid} if IMAGE in part else {}
            parts.append(model(input_ids=part, past_key_values=cache, **images).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)


def test_prompts_of_one_token(model):
    """Grown token by token, by hand and for classifier-free guidance."""
    ids = torch.tensor([[5, 17, 9, 80]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        outputs = model(input_ids=ids[:, :1], use_cache=True)
        parts = [outputs.logits]
        for place in range(1, 4):
            outputs = model(input_ids=ids[:, place : place + 1], past_key_values=outputs.past_key_values)
            parts.append(outputs.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
    assert model.generate(ids, **GREEDY, guidance_scale=1.5).shape == (1, 12)


def test_reused_static_cache(model, prompts):
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with torch.no_grad():
        model(**one(prompts[0]), past_key_values=cache)
        cache.reset()
        expected = model(input_ids=torch.tensor([[5, 17]])).logits[:, -1:]
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        torch.testing.assert_close(
            model(input_ids=torch.tensor([[17]]), past_key_values=cache).logits, expected, rtol=0, atol=1e-4
        )


def test_generated_image_tokens_have_no_place(model, prompts, monkeypatch):
    seen = []
    forward = type(model.model.language_model).forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs["position_ids"].clone())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.language_model), "forward", spy)
    inputs = one(prompts[0])
    model.generate(**inputs, **GREEDY, prefix_allowed_tokens_fn=lambda *_: [IMAGE])
    prompt, *steps = seen
    assert [step[:, 0, 0].tolist() for step in steps] == [[int(prompt[0].max()) + i, 0, 0] for i in range(1, 8)]


def test_chunked_prefill_after_a_cache(model):
    turns = conversation()
    whole = joined(turns[:2])
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**one(turns[0]), past_key_values=cache)
    expected = new_tokens(model, one(whole))
    # The second turn: 3 words, then <img>, 3 visual tokens, </img>, ...: 7 tokens end behind its first image.
    found = new_tokens(model, one(whole), past_key_values=copy.deepcopy(cache), prefill_chunk_size=7)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="prefill_chunk_size=5 would split"):
        new_tokens(model, one(whole), past_key_values=cache, prefill_chunk_size=5)


@pytest.mark.parametrize("cuts", [[4], [3, 4], [3, 7], [1, 2, 3, 4, 7, 8]])
def test_chunks_of_any_size_continue_with_the_correct_index(model, cuts):
    """Also a chunk that is `<img>` alone: the indices are those of the whole."""
    ids = torch.tensor([[1, 2, 3, IMAGE_START, IMAGE, IMAGE, IMAGE_END, 4, 5]])
    pixels, grid = torch.randn(8, 768, generator=torch.Generator().manual_seed(4)), torch.tensor([[2, 4]])
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels, image_grid_hw=grid).logits
        cache = DynamicCache(config=model.config.text_config)
        parts = []
        for part in ids.tensor_split(cuts, dim=1):
            images = {"pixel_values": pixels, "image_grid_hw": grid} if IMAGE in part else {}
            parts.append(model(input_ids=part, past_key_values=cache, **images).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pad", [0, IMAGE_START])
def test_right_padding_of_any_token_is_continued(model, prompts, pad):
    """The row ends at its last attended token, whatever stands in the padding."""
    inputs = batch(prompts[:2], "right")
    mask = inputs["attention_mask"]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, pad)
    more = torch.tensor([[7, 8], [9, 10]])
    with torch.no_grad():
        expected = []
        for row, prompt in enumerate(prompts[:2]):
            alone = one(prompt)
            alone["input_ids"] = torch.cat([alone["input_ids"], more[row : row + 1]], 1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            expected.append(model(**alone).logits[:, -2:])
        outputs = model(**inputs, use_cache=True)
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        found = model(input_ids=more, attention_mask=mask, past_key_values=outputs.past_key_values).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)


def test_rows_of_padding_do_not_move(model, prompts):
    """A chunk in which a row is padding alone leaves where that row continues."""
    first, second, third = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[9], [0]]), torch.tensor([[3, 4], [1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[:, -2:] for ids in ([5, 6, 9, 3, 4], [7, 8, 1, 2])]
        cache = DynamicCache(config=model.config.text_config)
        model(input_ids=first, attention_mask=mask[:, :2], past_key_values=cache)
        model(input_ids=second, attention_mask=mask[:, :3], past_key_values=cache)
        found = model(input_ids=third, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [DynamicCache, NeoCache])
@pytest.mark.parametrize("split", [0, 4, 12])
@torch.no_grad()
def test_cropped_caches_continue_with_the_correct_index(model, kind, split):
    """Cut back to any length and continued, as the tokens up to there are; within an image, refused."""
    ids = torch.tensor([[1, 2, 3, IMAGE_START, *[IMAGE] * 6, IMAGE_END, 4, IMAGE_START, IMAGE, IMAGE_END, 5, 6, 7]])
    pixels = torch.randn(28, 768, generator=torch.Generator().manual_seed(4))
    grid, more = torch.tensor([[4, 6], [2, 2]]), torch.tensor([[8, IMAGE_START, IMAGE, IMAGE_END, 9]])
    first, both, last = (
        {"pixel_values": pixels[patches], "image_grid_hw": grid[which]}
        for patches, which in ((slice(24), slice(1)), (slice(None), slice(None)), (slice(24, None), slice(1, None)))
    )
    parts = {
        0: [(ids, both)],
        4: [(ids[:, :4], {}), (ids[:, 4:], both)],
        12: [(ids[:, :12], first), (ids[:, 12:], last)],
    }
    for length in range(1, ids.shape[1]):
        cache = kind(config=model.config.text_config)
        for part, images in parts[split]:
            model(input_ids=part, past_key_values=cache, **images)
        cache.crop(length - ids.shape[1])
        if ids[0, length - 1] == ids[0, length] == IMAGE:
            with pytest.raises(ValueError, match=f"cropped from 18 to {length} tokens, within an image"):
                model(input_ids=more, past_key_values=cache, **last)
            continue
        found = [model(input_ids=more, past_key_values=cache, **last).logits]
        found += [model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits for token in (10, 11)]
        whole = torch.cat([ids[:, :length], more, torch.tensor([[10, 11]])], dim=1)
        sizes = [count for count, end in ((6, 10), (1, 14)) if length >= end]
        grids = torch.cat([grid[: len(sizes)], grid[1:]])
        patches = torch.cat([pixels[: 4 * sum(sizes)], pixels[24:]])
        expected = model(input_ids=whole, pixel_values=patches, image_grid_hw=grids).logits[:, length:]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_cropped_batches_continue_with_the_correct_index(model, prompts):
    """Also after rows have traded places, and over padding on the right."""
    inputs = batch(prompts[:2], "right")  # rows of 14 and 11 tokens
    cache = NeoCache(model.config.text_config)
    model(**inputs, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-1)
    more = torch.tensor([[7, 8], [9, 10]])
    mask = torch.cat([inputs["attention_mask"].flip(0)[:, :13], torch.ones_like(more)], dim=1)
    found = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    for row, prompt in enumerate((prompts[1], prompts[0])):
        ids = torch.cat([prompt[0][:13], more[row]])
        expected = model(**one((ids, *prompt[1:]))).logits[:, -2:]
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-4)
