"""What transformers expects of any vision-language model and its processor."""

import copy
import inspect

import numpy as np
import pytest
import torch
from helpers import IMAGE, batch, one, random_model, random_prompt, tiny_config
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from neo_hf import NeoForConditionalGeneration, NeoModel, NeoTextModel
from neo_hf.cache_neo import CACHE_NAME

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
both_classes = pytest.mark.parametrize("model_class", [NeoModel, NeoForConditionalGeneration])


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [random_prompt(generator, images) for images in ([(2, 3)], [], [(1, 2), (2, 2)])]


@pytest.fixture(scope="module")
def inputs(prompts):
    return batch(prompts)


def build(model_class=NeoForConditionalGeneration, **kwargs):
    whole = random_model(tiny_config(**kwargs))
    return whole.model if model_class is NeoModel else whole


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


# Saving and loading


@both_classes
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(model_class, inputs, tmp_path, tied):
    model = build(model_class, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = run(model, inputs)[0]
    for folder in ("whole", "shards"):
        again, info = model_class.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(run(again, inputs)[0], expected)
    again = model_class.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(run(again, inputs)[0], expected)
    assert model_class.from_pretrained(tmp_path / "whole", torch_dtype="bfloat16").dtype == torch.bfloat16


def test_base_model_and_whole_model_share_files(inputs, tmp_path):
    model = build(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "whole")
    base, info = NeoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}
    assert torch.equal(run(base, inputs)[0], run(model.model, inputs)[0])
    base.save_pretrained(tmp_path / "base")
    tied = NeoForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert torch.equal(tied.model.patch_embed.dense_embedding.weight, model.model.patch_embed.dense_embedding.weight)


def test_copies_and_pickles(inputs, tmp_path):
    model = build()
    expected = run(model, inputs).logits
    assert torch.equal(run(copy.deepcopy(model), inputs).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(run(torch.load(tmp_path / "model.pt", weights_only=False), inputs).logits, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights(tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    again = NeoForConditionalGeneration.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    for part in (model.get_input_embeddings(), model.lm_head):
        assert part.weight.requires_grad


def test_other_sizes_are_replaced_on_demand(tmp_path):
    build().save_pretrained(tmp_path)
    config = tiny_config(text_config={"intermediate_size": 80})
    with pytest.raises(RuntimeError, match="mismatch"):
        NeoForConditionalGeneration.from_pretrained(tmp_path, config=config)
    model, info = NeoForConditionalGeneration.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 9
    assert model.model.language_model.layers[0].mlp.up_proj.weight.std() < 0.03


# Initialisation


@both_classes
def test_every_missing_weight_is_initialised(model_class):
    torch.manual_seed(0)
    model = model_class.from_pretrained(None, config=tiny_config(), state_dict={})
    expected = model_class(tiny_config())
    for (name, found), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert found.device.type == "cpu"
        assert found.std() == pytest.approx(other.std().item(), rel=0.3, abs=1e-6), name
        assert found.mean() == pytest.approx(other.mean().item(), abs=0.05), name
    assert not list(model.buffers())


def test_initializer_range_scales_all_weights():
    model = NeoForConditionalGeneration(tiny_config(text_config={"initializer_range": 1e-10}))
    for name, parameter in model.named_parameters():
        assert round(float(parameter.detach().mean()), 9) in (0.0, 1.0), name


def test_meta_device():
    with torch.device("meta"):
        model = NeoForConditionalGeneration(tiny_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# Embeddings


def test_get_and_set_embeddings(inputs):
    model = build(tie_word_embeddings=False)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert model.get_decoder() is model.model.language_model
    embeddings = nn.Embedding(512, 64)
    model.set_input_embeddings(embeddings)
    assert model.model.language_model.embed_tokens is embeddings
    head = nn.Linear(64, 512, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(inputs, tmp_path, tied):
    model = build(tie_word_embeddings=tied)
    expected = run(model, inputs).logits
    model.resize_token_embeddings(530)
    assert model.config.get_text_config().vocab_size == 530
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    found = run(model, inputs).logits
    assert found.shape[-1] == 530
    torch.testing.assert_close(found[..., :512], expected)
    run(model, {"input_ids": torch.tensor([[529]])})
    model.save_pretrained(tmp_path)
    again = NeoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs).logits, found)
    model.resize_token_embeddings(510)
    torch.testing.assert_close(run(model, inputs).logits, expected[..., :510])
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 512


# Outputs


@both_classes
def test_tuples_and_outputs(model_class, inputs):
    model = build(model_class, attn_implementation="eager")
    kwargs = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    if model_class is NeoForConditionalGeneration:
        kwargs["labels"] = inputs["input_ids"]
    outputs = run(model, inputs, **kwargs)
    as_tuple = run(model, inputs, **kwargs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    model.config.return_dict = model.config.get_text_config().return_dict = False
    by_config = run(model, inputs, **kwargs)
    assert len(as_tuple) == len(by_config) == len(outputs.to_tuple())

    def compare(a, b):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        elif isinstance(a, tuple):
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert type(a) is type(b)

    compare(outputs.to_tuple(), as_tuple)
    compare(outputs.to_tuple(), by_config)


def test_gradients_of_hidden_states_and_attentions(inputs):
    model = build(attn_implementation="eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    outputs.hidden_states[0].retain_grad()
    outputs.attentions[0].retain_grad()
    outputs.logits[-1, -1, 0].backward()
    assert outputs.hidden_states[0].grad.any()
    assert outputs.attentions[0].grad.any()


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 5])])
def test_logits_to_keep(inputs, keep):
    model = build()
    whole = run(model, inputs).logits
    part = whole[:, keep] if isinstance(keep, torch.Tensor) else whole[:, -keep:]
    torch.testing.assert_close(run(model, inputs, logits_to_keep=keep).logits, part)


@both_classes
def test_image_features(model_class, prompts, inputs):
    model = build(model_class)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    with torch.no_grad():
        features = model.get_image_features(**pixels)
        assert isinstance(features, BaseModelOutputWithPooling)
        assert features.last_hidden_state.shape == (len(inputs["pixel_values"]), 32)
        assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(6, 64), (2, 64), (4, 64)]
        alone = model.get_image_features(prompts[0][1], prompts[0][2]).pooler_output[0]
        torch.testing.assert_close(features.pooler_output[0], alone)
        assert isinstance(model.get_image_features(**pixels, return_dict=False), tuple)
    assert torch.equal(run(model, inputs).image_hidden_states, torch.cat(features.pooler_output))


def test_images_count(inputs, prompts):
    """Images change the answer, each at its place."""
    model = build()
    expected = run(model, inputs).logits
    for row, patches in ((0, slice(0, 24)), (2, slice(24, 32)), (2, slice(32, 48))):
        pixels = inputs["pixel_values"].clone()
        pixels[patches] = 0
        found = run(model, inputs | {"pixel_values": pixels}).logits
        changed = (found != expected).flatten(1).any(-1)
        assert changed.tolist() == [i == row for i in range(3)]


def test_mismatched_counts_raise(inputs):
    model = build()
    fewer = inputs | {"pixel_values": inputs["pixel_values"][:24], "image_grid_hw": inputs["image_grid_hw"][:1]}
    with pytest.raises(ValueError, match="12 image tokens"):
        run(model, fewer)
    twice = {name: torch.cat([inputs[name]] * 2) for name in ("pixel_values", "image_grid_hw")}
    with pytest.raises(ValueError, match="24 visual tokens"):
        run(model, inputs | twice)
    with pytest.raises(ValueError, match="12 image tokens"):
        model.generate(**fewer, **GREEDY)


def test_grids_with_time(inputs):
    """As clients of other models carry them."""
    model = build()
    with_time = {name: value for name, value in inputs.items() if name != "image_grid_hw"}
    with_time["image_grid_thw"] = nn.functional.pad(inputs["image_grid_hw"], (1, 0), value=1)
    assert torch.equal(run(model, with_time).logits, run(model, inputs).logits)
    for settings in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = model.generate(**inputs, **GREEDY, **settings)
        assert torch.equal(model.generate(**with_time, **GREEDY, **settings), expected)
    with_time["image_grid_thw"][1, 0] = 2
    with pytest.raises(ValueError, match=r"image_grid_thw must be \(1, rows, columns\).*\[2, 2, 4\]"):
        run(model, with_time)


def test_signatures():
    for model_class in (NeoModel, NeoForConditionalGeneration):
        assert next(iter(inspect.signature(model_class.forward).parameters.values())).name == "self"
        assert [*inspect.signature(model_class.forward).parameters][1] == model_class.main_input_name == "input_ids"
        assert model_class.input_modalities == ("image", "text")
    assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["neo"] == "NeoForConditionalGeneration"
    assert isinstance(AutoModelForImageTextToText.from_config(tiny_config()), NeoForConditionalGeneration)


# Rows of a batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_depend_on_their_batch(prompts, side):
    model = build()
    inputs = batch(prompts, side)
    found = run(model, inputs, output_hidden_states=True)
    for row, prompt in enumerate(prompts):
        alone = run(model, one(prompt), output_hidden_states=True)
        mask = inputs["attention_mask"][row] == 1
        torch.testing.assert_close(found.logits[row, mask], alone.logits[0], rtol=0, atol=1e-4)
        for state, expected in zip(found.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(state[row, mask], expected[0], rtol=0, atol=1e-4)


def test_runs_are_alike(inputs):
    model = build()
    assert torch.equal(run(model, inputs).logits, run(model, inputs).logits)


@both_classes
def test_inputs_embeds_instead_of_ids(model_class, inputs):
    model = build(model_class)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(run(model, rest, inputs_embeds=embeds)[0], run(model, inputs)[0])


# Attention implementations


def test_attention_is_set_anywhere_and_agrees(inputs):
    model = build(attn_implementation="sdpa")
    assert model.config.text_config is model.model.language_model.config
    assert model.config.vision_config is model.model.patch_embed.config
    expected = run(model, inputs).logits
    mask = inputs["attention_mask"] == 1
    for implementation in ("eager", {"text_config": "sdpa"}, {"": "eager", "text_config": "eager"}, "sdpa"):
        model.set_attn_implementation(implementation)
        wanted = implementation if isinstance(implementation, str) else implementation["text_config"]
        assert model.model.language_model.config._attn_implementation == wanted
        torch.testing.assert_close(run(model, inputs).logits[mask], expected[mask], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="Flash Attention 2"):
        build(attn_implementation="flash_attention_2")
    assert run(model, inputs, output_hidden_states=True).attentions is None


@pytest.mark.parametrize("head_dim", [16, 64])
def test_head_sizes(inputs, head_dim):
    config = tiny_config(head_dim=head_dim)
    eager, sdpa = (random_model(copy.deepcopy(config), attn_implementation=name) for name in ("eager", "sdpa"))
    mask = inputs["attention_mask"] == 1
    torch.testing.assert_close(run(eager, inputs).logits[mask], run(sdpa, inputs).logits[mask], rtol=0, atol=1e-4)
    assert torch.equal(eager.generate(**inputs, **GREEDY), sdpa.generate(**inputs, **GREEDY))


# Training


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_training(inputs, checkpointing):
    model = build().train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        assert model.is_gradient_checkpointing
        if checkpointing["use_reentrant"]:
            model.enable_input_require_grads()
    model(**inputs, labels=labels).loss.backward()
    plain = build()
    plain(**inputs, labels=labels).loss.backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert expected.grad.any(), name
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-5, msg=name)
    if checkpointing:
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing


def test_kwargs_reach_the_loss(inputs):
    model = build()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    predicted_by_text = inputs["attention_mask"][:, :-1] != 0
    count = int(((labels[:, 1:] != -100) & (labels[:, 1:] != IMAGE) & predicted_by_text).sum())
    mean = run(model, inputs, labels=labels).loss
    total = run(model, inputs, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * total, mean)


# Generation


def test_generation_outputs(inputs):
    model = build(attn_implementation="eager")
    rows, length = inputs["input_ids"].shape
    ask = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ask |= {"output_hidden_states": True, "output_attentions": True}
    greedy = model.generate(**inputs, **GREEDY, **ask)
    assert torch.equal(greedy.sequences, model.generate(**inputs, **GREEDY))
    assert len(greedy.scores) == len(greedy.logits) == len(greedy.hidden_states) == len(greedy.attentions) == 4
    layer = greedy.past_key_values.layers[0]
    assert layer.keys.shape == (rows, 2, length + 3, 64)  # T, H and W: twice head_dim
    assert layer.values.shape == (rows, 2, length + 3, 32)
    beams = model.generate(**inputs, **GREEDY, **ask, num_beams=2, num_return_sequences=2)
    assert beams.sequences.shape == (2 * rows, length + 4)
    assert beams.sequences_scores.shape == (2 * rows,)
    samples = model.generate(**inputs, **GREEDY | {"do_sample": True}, num_return_sequences=3)
    assert samples.shape == (3 * rows, length + 4)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_caches_agree(inputs, cache):
    model = build()
    expected = model.generate(**inputs, **GREEDY)
    settings = {"use_cache": False} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(model.generate(**inputs, **GREEDY, **settings), expected)


# Processor


def test_processor_saves_and_loads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.to_json_string() == processor.to_json_string()
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    for name in ("image_processor", "video_processor"):
        assert getattr(again, name).to_json_string() == getattr(processor, name).to_json_string()


def test_processor_inputs(processor):
    image = Image.effect_noise((96, 64), 64).convert("RGB")
    inputs = processor(text="<image>Hm?", images=image, return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names)
    same = [
        processor(images=images, text=["<image>Hm?"], return_tensors="pt")
        for images in (
            [image],
            [[image]],
            np.array(image),
            torch.from_numpy(np.array(image)).permute(2, 0, 1),
        )
    ]
    for other in same:
        assert all(torch.equal(inputs[name], other[name]) for name in inputs)
    assert set(processor(text="Hm?")) == {"input_ids", "attention_mask"}
    assert set(processor(images=image)) == {"pixel_values", "image_grid_hw"}
    with pytest.raises(ValueError, match="needs text, images or videos"):
        processor()


def test_processor_kwargs(processor):
    image = Image.effect_noise((96, 64), 64).convert("RGB")
    call = {"text": ["<image>Hm?", "<image>Hm? Well?"], "images": [[image], [image]], "return_tensors": "pt"}
    padded = processor(**call, padding="max_length", max_length=60, padding_side="right")
    assert padded["input_ids"].shape == (2, 60)
    assert padded["attention_mask"][:, 0].all()
    nested = processor(
        **call,
        text_kwargs={"padding": "max_length", "max_length": 60, "padding_side": "right"},
        images_kwargs={"do_normalize": False, "rescale_factor": 2.0},
    )
    assert torch.equal(nested["input_ids"], padded["input_ids"])
    assert nested["pixel_values"].mean() > 1
    flat = processor(**call, do_normalize=False, rescale_factor=2.0)
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    with_time = processor(**call, return_image_grid_thw=True)
    assert with_time["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    assert "image_grid_hw" not in with_time


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_chat_template_of_batches(processor, return_tensors):
    image = Image.effect_noise((96, 64), 64).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Hm?"}]
    conversations = [[{"role": "user", "content": content}], [{"role": "user", "content": "Hello!"}]]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(conversations, **settings, return_tensors=return_tensors)
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    expected = processor(text=prompts, images=[[image], []], return_tensors=return_tensors)
    assert set(inputs) == set(expected)
    for name in inputs:
        assert np.array_equal(np.asarray(inputs[name]), np.asarray(expected[name])), name
    with_time = processor.apply_chat_template(
        conversations, **settings, return_tensors=return_tensors, processor_kwargs={"return_image_grid_thw": True}
    )
    assert np.asarray(with_time["image_grid_thw"]).tolist() == [[1, 4, 6]]


def test_text_model_alone():
    model = NeoTextModel(tiny_config().text_config)
    position_ids = torch.stack([torch.arange(5)[None], torch.zeros(1, 5), torch.zeros(1, 5)]).long()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        expected = model(inputs_embeds=model.embed_tokens(ids), position_ids=position_ids).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, expected)
        cache = model(ids[:, :3], use_cache=True)[CACHE_NAME]
        torch.testing.assert_close(model(ids[:, 3:], cache=cache).last_hidden_state, expected[:, 3:])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.embed_tokens(ids))
