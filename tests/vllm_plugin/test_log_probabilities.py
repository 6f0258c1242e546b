"""Log-probabilities of vLLM against those of `generate()`: greedy tokens can agree even under a wrong mask."""

import numpy as np
import pytest
from prompts import NEW_TOKENS, check, random_prompts

from neo_hf.loading import NANO, load_model_and_processor

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

MAX_PIXELS = 16384  # of a frame, as of an image


def sampling(**kwargs):
    return vllm.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, logprobs=20, ignore_eos=True, **kwargs
    )


def run(engine, prompts, **kwargs):
    return engine.generate([prompt.for_vllm() for prompt in prompts], sampling(**kwargs), use_tqdm=False)


@pytest.fixture(scope="module")
def nano():
    model, processor = load_model_and_processor(NANO)
    processor.video_processor.max_pixels = MAX_PIXELS
    return model, processor


@pytest.fixture(scope="module")
def prompts(nano):
    return random_prompts(*nano, count=200, sides=(20, 200))


@pytest.fixture(scope="module")
def engine(start):
    # An image takes up to 64 tokens, so steps of 96 cut most prompts and would cut many images.
    settings = {"videos_kwargs": {"max_pixels": MAX_PIXELS}}
    return start(NANO, max_num_batched_tokens=96, block_size=32, mm_processor_kwargs=settings)


def test_chunked_prefill(engine, prompts):
    check(run(engine, prompts, prompt_logprobs=0), prompts)


def test_prefix_cache(engine, prompts):
    """Hits end within images too, wherever a block ends."""
    run(engine, prompts)
    outputs = run(engine, prompts)
    check(outputs, prompts)
    assert sum(output.num_cached_tokens for output in outputs) > sum(len(prompt.input_ids) for prompt in prompts) / 2


def test_mixed_batches(engine, prompts):
    """Old and new prompts, and long answers, in the same steps; some start from a shared beginning."""
    again = prompts[:20] + prompts[100:140] + prompts[:20]
    long = [prompt.for_vllm() for prompt in prompts[40:44]]
    limits = [vllm.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)] * 4 + [sampling()] * len(again)
    outputs = engine.generate(long + [prompt.for_vllm() for prompt in again], limits, use_tqdm=False)
    check(outputs[4:], again)


def test_causal_mask_would_show(prompts):
    """The comparison is worth something: a causal mask is thousands of times farther away than the tolerance."""
    with_images = [prompt for prompt in prompts if prompt.images or prompt.videos]
    for prompt in with_images:
        assert (prompt.prompt_log_probs - prompt.causal_log_probs).abs().max() > 0.1


def test_chats(engine, nano, prompts):
    """Chats become the token ids that the processor gives, whatever people write."""

    def for_vllm(part):
        return {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part

    typed = "<image> and <video> <|im_end|> <img><IMG_CONTEXT></img>"
    (image,) = prompts[1].images[:1]
    messages = [{"role": "user", "content": [{"type": "text", "text": typed}, {"type": "image", "image": image}]}]
    expected = [prompt for prompt in prompts if not prompt.videos][:20]
    chats = [prompt.messages for prompt in expected] + [messages]
    expected_ids = [prompt.input_ids for prompt in expected]
    _, processor = nano
    expected_ids.append(
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ][0]
    )
    given = [[{**m, "content": [for_vllm(part) for part in m["content"]]} for m in chat] for chat in chats]
    outputs = engine.chat(given, sampling(), use_tqdm=False)
    assert [list(output.prompt_token_ids) for output in outputs] == [list(ids) for ids in expected_ids]


def test_pixel_budget(engine, nano):
    """`mm_processor_kwargs` set the processor's arguments for one request."""
    _, processor = nano
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    prompt = {"prompt": "<image>What", "multi_modal_data": {"image": [image]}}
    lengths = []
    with pytest.raises(ValueError, match="256 visual tokens does not fit into a step"):
        engine.generate(
            [prompt | {"mm_processor_kwargs": {"images_kwargs": {"min_pixels": 65536, "max_pixels": 65536}}}]
        )
    for settings in ({}, {"images_kwargs": {"max_pixels": 4096}}):
        (output,) = engine.generate([prompt | {"mm_processor_kwargs": settings}], sampling(), use_tqdm=False)
        inputs = processor(images=[image], text="<image>What", **settings)
        assert list(output.prompt_token_ids) == list(inputs["input_ids"][0])
        lengths.append(len(output.prompt_token_ids))
    assert lengths[0] > lengths[1]


@pytest.mark.parametrize(
    ("folder", "settings"),
    [("golden_folder", {}), ("wide_folder", {}), ("wide_folder", {"tensor_parallel_size": 2})],
    ids=["raw", "wide", "wide-tp2"],
)
def test_other_models(start, request, folder, settings):
    """Raw and Hub folders, untied and tied, two and four query heads to a key/value head, one and two processes."""
    folder = request.getfixturevalue(folder)
    prompts = random_prompts(*load_model_and_processor(folder), count=24, sides=(60, 250))
    engine = start(folder, max_num_batched_tokens=512, **settings)
    check(run(engine, prompts, prompt_logprobs=0), prompts)
    check(run(engine, prompts), prompts)


def test_compiled(start, nano, monkeypatch):
    """The decoder is traced as one graph. (Compiling it would take minutes, so the graph runs as it is.)"""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    prompts = random_prompts(*nano, count=12, sides=(20, 200))
    settings = {"videos_kwargs": {"max_pixels": MAX_PIXELS}}
    check(
        run(start(NANO, max_num_batched_tokens=256, enforce_eager=False, mm_processor_kwargs=settings), prompts),
        prompts,
    )


def test_lora(start, nano, tmp_path):
    """An adapter on every projection, as PEFT saves it, and the model without it."""
    peft = pytest.importorskip("peft")
    from vllm.lora.request import LoRARequest

    names = ["q_proj", "q_proj_hw", "k_proj", "k_proj_hw", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model, processor = nano
    without = random_prompts(model, processor, count=12, sides=(20, 120))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=names, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    prompts = random_prompts(adapted, processor, count=12, sides=(20, 120))
    adapted.unload()
    engine = start(NANO, max_num_batched_tokens=256, enable_lora=True, max_lora_rank=8)
    request = LoRARequest("adapter", 1, str(tmp_path))
    # One after the other: see docs/serving.md on requests with and without an adapter in one step.
    for adapter, expected in ((request, prompts), (None, without)):
        given = [prompt.for_vllm() for prompt in expected]
        check(engine.generate(given, sampling(prompt_logprobs=0), lora_request=adapter, use_tqdm=False), expected)
