import copy
from unittest.mock import patch

import pytest
import torch
from helpers import IMAGE, batch, golden_case, one, random_model, random_prompt, tiny_config
from torch.nn import functional as F
from transformers import DynamicCache

from neo_hf import NeoForConditionalGeneration, allocate_position_ids, native_primitive_neo
from neo_hf.rotary_neo import rotary_tables, rotate_patches


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    images = ([(2, 3)], [], [(1, 4), (3, 2)], [(1, 1)])
    return [random_prompt(generator, grids, text=2 + i) for i, grids in enumerate(images)]


def logits_alone(model, prompts):
    with torch.no_grad():
        return [model(**one(prompt)).logits[0] for prompt in prompts]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding(model, prompts, side, use_cache):
    inputs = batch(prompts, side)
    with torch.no_grad():
        logits = model(**inputs, use_cache=use_cache).logits
    for row, mask, expected in zip(logits, inputs["attention_mask"], logits_alone(model, prompts), strict=True):
        torch.testing.assert_close(row[mask == 1], expected, rtol=0, atol=1e-4)


HOW = ["document_ids", "document_ids and padding", "position_ids that start anew", "and a mask of ones"]


@pytest.mark.parametrize("how", HOW)
def test_packed_rows(model, prompts, how):
    ids, pixels, grids = (torch.cat(parts) for parts in zip(*prompts, strict=True))
    lengths = [len(prompt[0]) for prompt in prompts]
    inputs = {"input_ids": ids[None], "pixel_values": pixels, "image_grid_hw": grids}
    # Numbers need not be sorted, nor different for documents that are not neighbours.
    document_ids = torch.tensor([4, 2, 4, 7]).repeat_interleave(torch.tensor(lengths))[None]
    if how in HOW[2:]:
        inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        if how == "and a mask of ones":
            inputs["attention_mask"] = torch.ones_like(document_ids)
    else:
        inputs["document_ids"] = document_ids
    if how == "document_ids and padding":
        inputs["input_ids"] = F.pad(inputs["input_ids"], (3, 2))
        inputs["attention_mask"] = F.pad(torch.ones_like(document_ids), (3, 2))
        inputs["document_ids"] = F.pad(document_ids, (3, 2), value=4)
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.past_key_values is None
    logits = outputs.logits[0]
    if how == "document_ids and padding":
        logits = logits[3:-2]
    torch.testing.assert_close(logits, torch.cat(logits_alone(model, prompts)), rtol=0, atol=1e-4)


def test_images_are_bidirectional_and_text_is_causal(model, prompts):
    inputs = one(prompts[2])
    inside = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    first, second = inside[:4], inside[4:]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[0, inside] = torch.randn(len(inside), embeds.shape[-1], generator=torch.Generator().manual_seed(2))
    position_ids = model.model.get_position_ids(inputs["input_ids"], inputs["image_grid_hw"])

    def influence(place):
        changed = embeds.clone()
        changed[0, place] += 1
        with torch.no_grad():
            states = [model.model(inputs_embeds=e, position_ids=position_ids)[0][0] for e in (embeds, changed)]
        return {int(i) for i in ((states[0] - states[1]).abs().amax(-1) > 1e-6).nonzero()}

    length = embeds.shape[1]
    assert influence(int(first[-1])) == set(range(int(first[0]), length))
    assert influence(int(second[1])) == set(range(int(second[0]), length))
    assert influence(2) == set(range(2, length))


def test_every_weight_and_every_axis_matters(model, prompts):
    """Fails where a projection, a norm or an index is ignored or mixed up."""
    inputs = one(prompts[2])
    with torch.no_grad():
        expected = model(**inputs).logits
        position_ids = model.model.get_position_ids(inputs["input_ids"], inputs["image_grid_hw"])
        for other in (position_ids[[0, 2, 1]], position_ids * torch.tensor([1, 0, 0])[:, None, None]):
            assert not torch.allclose(model(**inputs, position_ids=other).logits, expected, atol=1e-3)
    changed = copy.deepcopy(model)
    for name, parameter in changed.named_parameters():
        with torch.no_grad():
            before = parameter.clone()
            parameter.flatten()[:7] += 0.5
            assert not torch.allclose(changed(**inputs).logits, expected, atol=1e-6), name
            parameter.copy_(before)


def test_images_of_a_batch_are_embedded_as_alone(model, prompts):
    inputs = batch(prompts)
    together = model.get_image_features(inputs["pixel_values"], inputs["image_grid_hw"]).pooler_output
    assert [len(tokens) for tokens in together] == [6, 4, 6, 1]
    pixels = inputs["pixel_values"].split(inputs["image_grid_hw"].prod(-1).tolist())
    for tokens, patches, grid in zip(together, pixels, inputs["image_grid_hw"], strict=True):
        alone = model.get_image_features(patches, grid[None]).pooler_output[0]
        torch.testing.assert_close(tokens, alone)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_prompts_in_chunks(model, prompts, chunk):
    """Without gradients, queries, keys and MLPs are computed for a few tokens at a time."""
    inputs = batch(prompts)
    expected = model(**inputs, use_cache=False).logits
    with torch.no_grad(), patch.multiple(native_primitive_neo, ROTARY_CHUNK=chunk, MLP_CHUNK=chunk):
        found = model(**inputs)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)


def test_patch_embedding_is_the_convolution_it_is_stored_as(model):
    """Without rotation: two convolutions over the image itself."""
    model = copy.deepcopy(model)
    embed = model.model.patch_embed
    embed.config.rope_parameters["rope_theta"] = float("inf")  # all frequencies 0 but the first
    rows, columns = 4, 6
    image = torch.randn(3, rows * 16, columns * 16, generator=torch.Generator().manual_seed(3))
    patches = image.reshape(3, rows, 16, columns, 16).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    features, tokens = embed(patches, torch.tensor([[rows, columns]]))
    expected = F.gelu(F.conv2d(image, embed.patch_embedding.weight, embed.patch_embedding.bias, stride=16))
    still = [*range(2, 16), *range(18, 32)]  # the channels that do not turn
    torch.testing.assert_close(features.T.reshape(-1, rows, columns)[still], expected[still])
    grid = features.T.reshape(1, -1, rows, columns)
    folded = F.conv2d(grid, embed.dense_embedding.weight, embed.dense_embedding.bias, stride=2)
    torch.testing.assert_close(tokens, folded[0].flatten(1).T)


def test_outputs(model, prompts):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    inputs = batch(prompts)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows, length = inputs["input_ids"].shape
    layers = model.config.text_config.num_hidden_layers
    assert [states.shape for states in outputs.hidden_states] == [(rows, length, 64)] * (layers + 1)
    assert [weights.shape for weights in outputs.attentions] == [(rows, 4, length, length)] * layers
    assert outputs.image_hidden_states.shape == (17, 64)
    assert [layer.keys.shape for layer in outputs.past_key_values.layers] == [(rows, 2, length, 64)] * layers
    assert [layer.values.shape for layer in outputs.past_key_values.layers] == [(rows, 2, length, 32)] * layers
    kept = model(**inputs, logits_to_keep=2).logits
    torch.testing.assert_close(kept, outputs.logits[:, -2:])
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_pre_buffer_and_post_llm_are_views(fresh_model):
    with pytest.raises(ValueError, match="5-layer model is unknown"):
        _ = fresh_model.pre_buffer
    fresh_model.config.text_config.num_pre_buffer_layers = 2
    layers = list(fresh_model.model.language_model.layers)
    for part in (fresh_model, fresh_model.model, fresh_model.model.language_model):
        assert list(part.pre_buffer) == layers[:2]
        assert list(part.post_llm) == layers[2:]


def test_gradient_checkpointing(model, prompts):
    inputs = batch(prompts) | {"labels": batch(prompts)["input_ids"]}
    gradients, recomputed = [], []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        calls = []
        trained.model.language_model.layers[1].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trained(**inputs).loss.backward()
        recomputed.append(len(calls))
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    assert recomputed == [1, 2]
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_loss_ignores_image_tokens(model, prompts):
    inputs = one(prompts[0])
    labels = inputs["input_ids"]
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:].masked_fill(labels[0, 1:] == IMAGE, -100))
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    # As the Trainer passes it for gradient accumulation.
    counted = (labels[0, 1:] != IMAGE).sum()
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=10).loss, expected * counted / 10)


def test_resize_token_embeddings(model, prompts):
    model = copy.deepcopy(model)
    before = logits_alone(model, prompts[:1])[0]
    model.resize_token_embeddings(520, mean_resizing=False)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 520
    torch.testing.assert_close(logits_alone(model, prompts[:1])[0][:, :512], before)


def test_initialisation():
    torch.manual_seed(0)
    model = NeoForConditionalGeneration(tiny_config(text_config={"hidden_size": 256}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "patch_embed" in name:  # PyTorch's default for Conv2d: uniform within 1 / sqrt(inputs of a kernel)
            bound = 1 / (3 * 16 * 16 if "patch_embedding" in name else 32 * 2 * 2) ** 0.5
            assert 0.8 * bound < parameter.abs().max() <= bound, name
        else:
            assert 0.018 < parameter.std() < 0.022, name


def test_full_graph_decoding_step(model, prompts, golden):
    """Given position ids, a step compiles in one piece (checked without generating code)."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    inputs = one(prompts[0])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        step = {
            "input_ids": torch.tensor([[5]]),
            "position_ids": torch.full((3, 1, 1), 9) * torch.tensor([1, 0, 0]).view(3, 1, 1),
        }
        other = copy.deepcopy(cache)
        expected = model(**step, past_key_values=other).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**step, past_key_values=cache).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "6 image tokens, but image_grid_hw describes 0|6 image tokens"),
        ({"image_grid_hw": None}, "need image_grid_hw"),
        ({"image_grid_hw": torch.tensor([[6, 4]])}, None),
        ({"image_grid_hw": torch.tensor([[4, 4]])}, r"24 patches, but the grids \[\[4, 4\]\] hold 16"),
        ({"image_grid_hw": torch.tensor([[3, 8]])}, r"positive multiples of 2 patches.*\(3, 8\)"),
        ({"pixel_values": torch.zeros(24, 700)}, r"\(patches, 768\), got \(24, 700\)"),
        ({"pixel_values": torch.zeros(20, 768)}, "20 patches"),
        ({"input_ids": torch.tensor([[1, 502, 501, 501, 503]])}, "2 image tokens"),
        ({"input_ids": torch.tensor([[1, 512]])}, "between 0 and 511, got 512"),
        ({"input_ids": torch.tensor([[1, -3]])}, "between 0 and 511, got -3"),
        ({"input_ids": torch.tensor([1, 502])}, r"shape \(rows, tokens\), got \(2,\) torch.int64"),
        ({"input_ids": torch.tensor([1, 502]), "labels": torch.tensor([1, 502])}, r"got \(2,\) torch.int64"),
        ({"input_ids": torch.tensor([[1.0]])}, r"an int64 or int32 tensor .* got \(1, 1\) torch.float32"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "exactly one of input_ids and inputs_embeds"),
        ({"position_ids": torch.zeros(4, 1, 12)}, r"got \(4, 1, 12\)"),
    ],
)
def test_bad_input(sdpa_model, golden, change, message):
    inputs, _ = golden_case(golden, "one_image")
    assert inputs["image_grid_hw"].tolist() == [[4, 6]]
    inputs = {**inputs, **change}
    if inputs["pixel_values"] is None:
        del inputs["image_grid_hw"], inputs["pixel_values"]
    if message is None:  # the same number of tokens in another shape is another image, not an error
        sdpa_model(**inputs)
        return
    with pytest.raises(ValueError, match=message):
        sdpa_model(**inputs)


def test_caches_of_others_are_refused(sdpa_model, golden):
    inputs, _ = golden_case(golden, "one_image")
    with torch.no_grad():
        cache = DynamicCache(config=sdpa_model.config.text_config)
        sdpa_model(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)  # which leaves what the model noted on it as it was
        with pytest.raises(ValueError, match=r"changed to 2 rows.*give position_ids"):
            sdpa_model(input_ids=torch.tensor([[1], [2]]), past_key_values=cache)
        with pytest.raises(ValueError, match="cannot follow a cache"):
            sdpa_model(input_ids=torch.tensor([[1]]), document_ids=torch.tensor([[0]]), past_key_values=cache)


def test_mixed_dtypes(model, prompts):
    """Pixels and features of another dtype than the weights; rotations stay in float32."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    inputs = one(prompts[2])
    assert inputs["pixel_values"].dtype == torch.float32
    with torch.no_grad():
        expected = model(**inputs).logits
        features = model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_hw"])
        features.pooler_output = tuple(tokens.float() for tokens in features.pooler_output)
        found = model(**inputs, mm_encoder_outputs={"image": features}).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)

    config = model.config.text_config
    position_ids = torch.full((3, 1, 2), 5001)
    tables = rotary_tables(position_ids, config.head_dim, config.rope_parameters, torch.bfloat16)
    exact = rotary_tables(position_ids, config.head_dim, config.rope_parameters, torch.float32)
    for found, expected in zip(tables, exact, strict=True):
        assert torch.equal(found, expected.to(torch.bfloat16))
    features = torch.randn(4, 32, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    rows, columns = torch.tensor([0, 7, 60, 99]), torch.tensor([3, 0, 41, 99])
    exact = rotate_patches(features.float(), rows, columns, 10_000.0)
    assert torch.equal(rotate_patches(features, rows, columns, 10_000.0), exact.to(torch.bfloat16))


def test_position_ids_of_padded_rows(model, prompts):
    inputs = batch(prompts)
    ids, mask, grids = (inputs[name] for name in ("input_ids", "attention_mask", "image_grid_hw"))
    found = model.model.get_position_ids(ids, grids, mask)
    roles = {"image_token_id": IMAGE, "image_start_token_id": 502}
    assert torch.equal(found, allocate_position_ids(ids, grids, attention_mask=mask, **roles))


def test_two_dimensional_position_ids_cannot_place_images(model, prompts):
    inputs = one(prompts[0])
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, position_ids=positions).logits, expected)
        features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grid_hw"))
        with pytest.raises(ValueError, match="6 image tokens, but image_grid_hw describes 0"):
            model(**inputs, position_ids=positions, mm_encoder_outputs={"image": features})


def test_no_images(model, prompts):
    """Empty tensors, as collators make of samples without images."""
    inputs = one(prompts[1])
    empty = {"pixel_values": torch.zeros(0, 768), "image_grid_hw": torch.zeros(0, 2, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, **empty).logits, model(**inputs).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **empty, **settings), model.generate(**inputs, **settings))


def test_own_mask(model, prompts):
    inputs = one(prompts[1])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        expected = model(**inputs).logits
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if model.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        found = model(**inputs | {"attention_mask": mask}).logits
    torch.testing.assert_close(found, expected)


def test_dropout_is_off_in_evaluation(prompts):
    model = random_model(tiny_config(text_config={"attention_dropout": 0.5}))
    with torch.no_grad():
        assert torch.equal(model(**one(prompts[0])).logits, model(**one(prompts[0])).logits)
        model.train()
        assert not torch.equal(model(**one(prompts[0])).logits, model(**one(prompts[0])).logits)


def test_plans():
    """Tensor parallelism and device maps find what they split and what they must not."""
    model = NeoForConditionalGeneration(tiny_config())
    layer = dict(model.model.language_model.layers[0].named_modules())
    plan = model.config.text_config.base_model_tp_plan
    split = {name.removeprefix("layers.*."): how for name, how in plan.items() if name.startswith("layers.")}
    assert split.keys() <= layer.keys()
    linear = {name for name, module in layer.items() if isinstance(module, torch.nn.Linear)}
    assert {name for name, how in split.items() if how in ("colwise", "rowwise")} == linear
    norms = {name for name in layer if name.startswith("self_attn.") and "norm" in name}
    assert {name for name, how in split.items() if how == "replicated_with_grad_allreduce"} == norms
    assert model._tp_plan["lm_head"] == "colwise_gather_output"
    assert {"NeoDecoderLayer", "NeoPatchEmbedding"} <= set(model._no_split_modules)
    assert set(model._skip_keys_device_placement) == {"past_key_values", "cache"}


def test_shift_labels_ignore_image_tokens(model, prompts):
    inputs = one(prompts[0])
    labels = inputs["input_ids"]
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, expected)
