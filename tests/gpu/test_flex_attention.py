"""FlexAttention as a card would run it, as far as a CPU can tell."""

from unittest.mock import patch

import pytest
import torch
from helpers import one, random_model, random_prompt, tiny_config
from transformers.integrations.flex_attention import flex_attention_forward

from neo_hf import attention_neo
from neo_hf.attention_neo import kernel_options_of

# Bytes of shared memory per block of threads, and compute capability.
A100, RTX_4090, H100, B200 = (166_912, (8, 0)), (101_376, (8, 9)), (232_448, (9, 0)), (232_448, (10, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_cards_get_small_blocks(dtype):
    assert kernel_options_of(dtype, *A100) is None
    assert kernel_options_of(dtype, *B200) is None
    assert (kernel_options_of(dtype, *H100) is None) == (dtype == torch.float32)
    options = kernel_options_of(dtype, *RTX_4090)
    rows, columns = (32, 16) if dtype == torch.float32 else (128, 32)
    assert (options["fwd_BLOCK_M"], options["fwd_BLOCK_N"], options["fwd_num_stages"]) == (rows, columns, 2)
    assert ("bwd_BLOCK_M1" in options) == (dtype != torch.float32)


def test_options_of_the_user_win(monkeypatch):
    """Through `generate()`, which refuses arguments that it does not find in `forward`."""
    monkeypatch.setattr(attention_neo, "find_kernel_options", lambda query: kernel_options_of(query.dtype, *RTX_4090))
    seen = []

    def record(*args, **kwargs):
        seen.append(kwargs["kernel_options"])
        return flex_attention_forward(*args, **kwargs | {"kernel_options": None})

    model = random_model(tiny_config(text_config={"num_hidden_layers": 1}), attn_implementation="flex_attention")
    inputs = one(random_prompt(torch.Generator().manual_seed(1), [(2, 3)]))
    with patch.object(attention_neo, "flex_attention_forward", record):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, kernel_options={"fwd_BLOCK_M": 64})
    chosen = {"fwd_BLOCK_N": 16, "fwd_num_stages": 2, "fwd_num_warps": 4, "FORCE_USE_FLEX_ATTENTION": True}
    assert seen == [chosen | {"fwd_BLOCK_M": 64}]


def test_no_fallback_to_dense_scores(monkeypatch):
    """Where dynamo would stop compiling and run FlexAttention uncompiled, there is an error."""
    monkeypatch.setattr(attention_neo, "MAX_FLEX_GRAPHS", 1)
    torch._dynamo.reset()
    inputs = one(random_prompt(torch.Generator().manual_seed(1), [(2, 3)]))
    with torch.no_grad():
        for heads in (2, 4):
            text = {"num_hidden_layers": 1, "num_attention_heads": heads}
            model = random_model(tiny_config(text_config=text), attn_implementation="flex_attention")
            if heads == 2:
                model(**inputs)
            else:
                with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                    model(**inputs)
    torch._dynamo.reset()


@pytest.mark.slow
def test_few_graphs():
    """Two models in training and evaluation, and three lengths, share the graphs of their layout of heads."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(2)
    prompts = [random_prompt(generator, [(3, 5)] * n) for n in (8, 10, 13)]
    with torch.no_grad():
        for seed in (0, 1):
            text = {"num_hidden_layers": 1, "head_dim": 64}
            model = random_model(tiny_config(text_config=text), seed, attn_implementation="flex_attention")
            for training in (False, True):
                model.train(training)
                for prompt in prompts:
                    model(**one(prompt))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
    torch._dynamo.reset()
