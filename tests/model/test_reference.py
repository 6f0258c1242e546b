"""Each part against the formulas of the paper in float64, at sizes and settings that no checkpoint has."""

import pytest
import torch
from helpers import IMAGE, IMAGE_START, batch, random_model, random_prompt, tiny_config
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from neo_hf.attention_neo import plan_attention
from neo_hf.cache_neo import NeoCache
from neo_hf.indexing_neo import allocate_position_ids

EPS = 0.3  # large enough that a norm with any other shows
THETAS = {"temporal": 70.0, "height": 30.0, "width": 11.0}


def unusual_model(**text_config):
    rope = {axis: {"rope_type": "default", "rope_theta": theta} for axis, theta in THETAS.items()}
    text_config = {"rms_norm_eps": EPS, "rope_parameters": rope, "num_hidden_layers": 1, **text_config}
    return random_model(tiny_config(text_config=text_config))


def reference_norm(x, norm):
    return norm.weight.double() * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)


def reference_rotation(x, places, theta):
    """x (L, heads, n) of an axis: half-split pairs turn by place * theta^(-2i / n)."""
    first, second = x.chunk(2, dim=-1)
    half = first.shape[-1]
    angles = torch.stack([places.double() * theta ** (-i / half) for i in range(half)], dim=-1)[:, None]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def reference_attention(attention, x, position_ids, sees):
    """x (L, E), position_ids (3, L), sees (L, L) boolean -> (L, E)."""
    d = attention.head_dim
    parts = {}
    for name in ("q", "k"):
        temporal = F.linear(x, getattr(attention, f"{name}_proj").weight.double()).unflatten(-1, (-1, d))
        spatial = F.linear(x, getattr(attention, f"{name}_proj_hw").weight.double()).unflatten(-1, (-1, d))
        height, width = spatial.chunk(2, dim=-1)
        axes = {"temporal": temporal, "height": height, "width": width}
        norms = {
            axis: getattr(attention, f"{name}_norm{suffix}")
            for axis, suffix in zip(axes, ("", "_h", "_w"), strict=True)
        }
        parts[name] = torch.cat(
            [
                reference_rotation(reference_norm(axes[axis], norms[axis]), places, THETAS[axis])
                for axis, places in zip(axes, position_ids, strict=True)
            ],
            dim=-1,
        )
    value = F.linear(x, attention.v_proj.weight.double()).unflatten(-1, (-1, d))
    groups = attention.num_key_value_groups
    outputs = []
    for head in range(parts["q"].shape[1]):
        scores = parts["q"][:, head] @ parts["k"][:, head // groups].T * d**-0.5
        outputs.append(scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value[:, head // groups])
    return F.linear(torch.cat(outputs, -1), attention.o_proj.weight.double())


@torch.no_grad()
def test_the_decoder_is_its_formulas():
    """A layer and the final norm, with an eps and three thetas of their own."""
    model = unusual_model()
    decoder, layer = model.model.language_model, model.model.language_model.layers[0]
    ids, _, grids = random_prompt(torch.Generator().manual_seed(1), [(2, 3), (3, 1)])
    places = allocate_position_ids(ids[None], grids, image_token_id=IMAGE, image_start_token_id=IMAGE_START)
    embeds = torch.randn(len(ids), 64, generator=torch.Generator().manual_seed(2))
    found = decoder(inputs_embeds=embeds[None], position_ids=places).last_hidden_state[0]

    temporal = places[0, 0]
    x = embeds.double()
    sees = temporal[:, None] >= temporal  # of two tokens with one T index, each sees the other
    x = x + reference_attention(layer.self_attn, reference_norm(x, layer.input_layernorm), places[:, 0], sees)
    y = reference_norm(x, layer.post_attention_layernorm)
    gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
    x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    torch.testing.assert_close(found.double(), reference_norm(x, decoder.norm), rtol=0, atol=1e-5)


def test_all_norms_have_the_eps_of_the_configuration():
    norms = [module for module in unusual_model().modules() if isinstance(module, Qwen3RMSNorm)]
    assert [norm.variance_epsilon for norm in norms] == [EPS] * 9


@torch.no_grad()
def test_long_rows_pass_the_mlps_whole():
    """Without gradients in pieces, with them at once: 2,100 tokens, so that pieces end within and at the end."""
    layer = unusual_model().model.language_model.layers[0]
    x = torch.randn(2, 2100, 64, generator=torch.Generator().manual_seed(1))
    layer.self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    found = layer(x.clone())
    expected = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(found, expected)


def reference_patches(patches, grids, embed, theta):
    """Patch features (P, D) in float64, image by image."""
    weight, bias = embed.patch_embedding.weight.flatten(1), embed.patch_embedding.bias
    features = F.gelu(F.linear(patches.to(weight.dtype), weight, bias)).double()
    places = torch.cat([torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids])
    quarter = features.shape[-1] // 4
    turned = features.clone()
    for half, axis in ((0, 1), (1, 0)):  # the first half of the channels turns by the column, the second by the row
        for i in range(quarter):
            angle = places[:, axis].double() * theta ** (-i / quarter)
            at = 2 * (half * quarter + i)
            x, y = features[:, at], features[:, at + 1]
            turned[:, at], turned[:, at + 1] = x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()
    return turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_patches_are_their_formulas(dtype):
    """
    More patches than are embedded at once, whose pieces end within a row, with rows and columns beyond 100. In half
    precision the rotation is still that of float32: the result is the exact one, rounded once.
    """
    model = random_model(tiny_config()).to(dtype)
    grids = [(2, 6), (34, 130), (120, 10)]
    patches = torch.randn(12 + 4420 + 1200, 768, generator=torch.Generator().manual_seed(1))
    embed = model.model.patch_embed
    found, tokens = embed(patches, torch.tensor(grids))
    expected = reference_patches(patches, grids, embed, embed.config.rope_parameters["rope_theta"])
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * rounding, atol=5e-5)

    start = 0
    sizes = [rows * columns // 4 for rows, columns in grids]
    for (rows, columns), its_tokens in zip(grids, tokens.split(sizes), strict=True):
        grid = found[start : start + rows * columns].T.reshape(1, -1, rows, columns)
        folded = F.conv2d(grid, embed.dense_embedding.weight, embed.dense_embedding.bias, stride=2)
        torch.testing.assert_close(its_tokens, folded[0].flatten(1).T)
        start += rows * columns


@pytest.mark.parametrize("implementation", ["neo", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_scores_beyond_float16(implementation, padded):
    """A single query whose scores exceed 65,504, the largest number of float16, attends as in float64."""
    generator = torch.Generator().manual_seed(1)
    query, key = (100 * torch.randn(1, heads, length, 64, generator=generator) for heads, length in ((4, 1), (2, 9)))
    key[:, :, 4] = key[:, :, 5] + 0.01 * torch.randn(1, 2, 64, generator=generator)  # two that share the weight
    query, key = query.half(), key.half()
    query = query + 3 * key[:, :, 4:5].repeat_interleave(2, 1)
    value = torch.randn(1, 2, 9, 32, generator=generator).half()
    scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 32**-0.5
    assert scores.max() > 65504

    config = tiny_config().text_config
    config._attn_implementation = implementation
    mask = torch.ones(1, 9)
    if padded:
        mask[0, :3] = 0
        scores[..., :3] = -torch.inf
    embeds, place = torch.zeros(1, 1, 64, dtype=torch.half), torch.full((3, 1, 1), 8)
    cache = NeoCache(config)
    cache.update(key[:, :, :8], value[:, :, :8], 0)
    attend, plan = plan_attention(config, embeds, mask if padded else None, place, cache)
    module = random_model(tiny_config()).model.language_model.layers[0].self_attn
    found, _ = attend(module, query, key, value, plan, scaling=32**-0.5)
    expected = (scores.softmax(-1) @ value.double().repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


@torch.no_grad()
def test_long_prompts_are_the_same_with_and_without_gradients():
    """Everything that works in pieces, in one model: rows of more than 1,024 tokens and 4,096 patches."""
    model = unusual_model(num_hidden_layers=2)
    generator = torch.Generator().manual_seed(1)
    prompts = [random_prompt(generator, [(3, 2), (24, 45)]), random_prompt(generator, [], text=1200)]
    inputs = batch(prompts)
    found = model(**inputs).logits
    with torch.enable_grad():
        expected = model(**inputs).logits
    attended = inputs["attention_mask"] == 1
    torch.testing.assert_close(found[attended], expected[attended], rtol=0, atol=1e-4)
