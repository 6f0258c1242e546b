"""Looking into the model and changing parts of it, by transformers' and PyTorch's own means."""

import copy

import pytest
import torch
from helpers import batch, random_model, random_prompt, tiny_config
from torch import nn


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return batch([random_prompt(generator, images) for images in ([(2, 3)], [(1, 2), (2, 2)])])


@pytest.fixture
def model():
    return random_model(tiny_config(text_config={"num_pre_buffer_layers": 2}), attn_implementation="eager")


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def test_hooks_see_what_output_hidden_states_returns(model, inputs):
    seen = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    outputs = run(model, inputs, output_hidden_states=True, output_attentions=True)
    states = outputs.hidden_states
    assert len(states) == len(seen) + 1 == 4
    for layer, (before, after) in enumerate(seen):
        assert torch.equal(before, states[layer])
        if layer < 2:  # the last state is behind the norm
            assert torch.equal(after, states[layer + 1])
    assert torch.equal(model.model.language_model.norm(seen[-1][1]), states[-1])
    assert torch.equal(model.lm_head(states[-1]), outputs.logits)
    rows, length = inputs["input_ids"].shape
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(rows, 4, length, length)] * 3
    attended = torch.cat(outputs.attentions)[:, :, inputs["attention_mask"][0] == 1].sum(-1)
    torch.testing.assert_close(attended, torch.ones_like(attended))


@pytest.mark.parametrize("part", ["model", ""])
def test_outputs_asked_for_by_the_configuration(model, inputs, part):
    model.config.output_hidden_states = True
    model.config.output_attentions = True
    outputs = run(model.get_submodule(part), inputs)
    assert len(outputs.hidden_states) == 4
    assert len(outputs.attentions) == 3
    assert run(model.get_submodule(part), inputs, output_hidden_states=False).hidden_states is None


def test_states_while_generating(model, inputs):
    output = model.generate(
        **inputs,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        output_logits=True,
    )
    rows, length = inputs["input_ids"].shape
    assert [[tuple(state.shape) for state in step] for step in output.hidden_states] == [
        [(rows, tokens, 64)] * 4 for tokens in (length, 1, 1)
    ]
    assert [[tuple(weights.shape) for weights in step] for step in output.attentions] == [
        [(rows, 4, tokens, length + i)] * 3 for i, tokens in enumerate((length, 1, 1))
    ]
    whole = {**inputs, "input_ids": output.sequences[:, :-1]}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(rows, 2, dtype=torch.long)], 1)
    expected = run(model, whole, logits_to_keep=3).logits
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=0, atol=1e-4)


def test_steering_by_a_hook(model, inputs):
    """A hook on a layer may change what it hands on, also while generating."""
    direction = torch.randn(64, generator=torch.Generator().manual_seed(1))
    handle = model.pre_buffer[1].register_forward_hook(lambda module, args, output: output + direction)
    outputs = run(model, inputs, output_hidden_states=True)
    handle.remove()
    plain = run(model, inputs, output_hidden_states=True)
    assert torch.equal(outputs.hidden_states[1], plain.hidden_states[1])
    torch.testing.assert_close(outputs.hidden_states[2], plain.hidden_states[2] + direction)
    assert not torch.allclose(outputs.logits, plain.logits)


class Skip(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


def set_layers(model, layers):
    """Other layers, numbered anew: caches go by the number."""
    model.model.language_model.layers = nn.ModuleList(layers)
    model.config.text_config.num_hidden_layers = len(layers)
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number


def test_replacing_and_skipping_layers_of_the_pre_buffer(model, inputs):
    layers = model.model.language_model.layers
    kept = [copy.deepcopy(layer) for layer in layers]
    layers[1] = Skip()
    states = run(model, inputs, output_hidden_states=True).hidden_states
    skipped = run(model, inputs).logits
    assert len(states) == 3  # a layer of another class is not recorded
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1]], skipped[:, -1].argmax(-1))

    set_layers(model, [kept[0], kept[2]])
    assert torch.equal(run(model, inputs).logits, skipped)
    cached = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, tokens)
    set_layers(model, [kept[1], kept[0], kept[2]])
    assert not torch.allclose(run(model, inputs).logits, skipped)


def test_freezing_by_name(model, inputs):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "_hw" in name or "patch_embed" in name
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    layers = range(3)
    assert trained == {
        f"model.language_model.layers.{i}.self_attn.{qk}_proj_hw.weight" for i in layers for qk in "qk"
    } | {f"model.patch_embed.{part}_embedding.{kind}" for part in ("patch", "dense") for kind in ("weight", "bias")}
    assert all(model.get_parameter(name).grad.any() for name in trained)


def test_features_computed_once(model, inputs):
    expected = run(model, inputs)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        features = model.get_image_features(**pixels)
    assert torch.equal(run(model, text, mm_encoder_outputs={"image": features}).logits, expected.logits)
    assert torch.equal(torch.cat(features.pooler_output), expected.image_hidden_states)

    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().clone()
    embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(features.pooler_output)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position_ids = model.model.get_position_ids(ids, inputs["image_grid_hw"], mask)
    found = run(model, {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids})
    assert torch.equal(found.logits, expected.logits)


def test_gradients_reach_the_pixels(model, inputs):
    """As attribution methods need."""
    pixels = inputs["pixel_values"].clone().requires_grad_()
    model(**inputs | {"pixel_values": pixels}).logits[:, -1].sum().backward()
    assert pixels.grad.abs().sum(-1).all()
