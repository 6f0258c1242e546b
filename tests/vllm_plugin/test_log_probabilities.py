"""Log-probabilities of vLLM against those of `generate()`: greedy tokens can agree even under a wrong mask."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from prompts import NEW_TOKENS, check, differences, expect, random_prompts
from safetensors.torch import load_file, save_file
from transformers import TorchAoConfig

from neo_hf import NeoImageProcessor
from neo_hf.loading import NANO, load_model_and_processor

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

MAX_PIXELS = 16384  # of a frame, as of an image
EAGER_GRAPH = {"mode": 1, "backend": "eager"}  # traced, not compiled


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
    return start("nano", max_num_batched_tokens=96, block_size=32, mm_processor_kwargs=settings)


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


def test_images_are_processed_once(engine, nano, monkeypatch):
    """vLLM's cache has an image that comes again, anywhere in a prompt, but not one of another pixel budget."""
    model, processor = nano
    pixels = np.random.default_rng(1).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    first, second = ({"type": "image", "image": Image.fromarray(image)} for image in pixels)
    words = {"type": "text", "text": "What is this?"}
    contents = [[first, words], [first, words], [words, second, words, first], [first, first], [second, words]]
    with monkeypatch.context() as patch:
        wide = [expect(model, processor, [{"role": "user", "content": content}]) for content in contents]
        patch.setattr(processor.image_processor, "max_pixels", 4096)
        narrow = [expect(model, processor, [{"role": "user", "content": content}]) for content in contents]
    assert len(wide[0].input_ids) > len(narrow[0].input_ids)

    processed = []
    process = NeoImageProcessor.process_image
    monkeypatch.setattr(
        NeoImageProcessor, "process_image", lambda *args, **kwargs: processed.append(args) or process(*args, **kwargs)
    )
    for prompts, settings, total in (
        (wide, {}, 2),
        (narrow, {"images_kwargs": {"max_pixels": 4096}}, 4),
        (wide, {}, 4),
    ):
        for prompt in prompts:  # one after the other
            given = prompt.for_vllm() | {"mm_processor_kwargs": settings}
            check(engine.generate([given], sampling(prompt_logprobs=0), use_tqdm=False), [prompt])
        assert len(processed) == total


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("golden_folder", {}),
        ("wide_folder", {}),
        ("wide_folder", {"tensor_parallel_size": 2}),
        # Without compilation, vLLM's worker for CPUs has no room for what the other process sends.
        ("wide_folder", {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": EAGER_GRAPH}),
    ],
    ids=["raw", "wide", "wide-tp2", "wide-pp2"],
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


def test_torchao(start, wide_folder, tmp_path):
    """8-bit weights, as saved by transformers."""
    quantisation = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantisation.Int8WeightOnlyConfig(version=2))
    model, processor = load_model_and_processor(wide_folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    prompts = random_prompts(model, processor, count=8, sides=(60, 250))
    check(run(start(tmp_path, max_num_batched_tokens=512), prompts, prompt_logprobs=0), prompts)


@pytest.mark.parametrize(("bits", "dtype", "tolerance"), [(8, "float32", 1e-4), (4, "bfloat16", 0.03)])
def test_compressed_tensors(start, wide_folder, tmp_path, bits, dtype, tolerance):
    """
    8-bit weights and inputs, and 4-bit weights in groups of 32, which the kernel multiplies in bfloat16 only, against
    `generate()` with the same rounded weights and inputs in float32. Medians: an input halfway between two numbers is
    rounded up by one and down by the other.
    """
    folder = tmp_path / "quantised"
    shutil.copytree(wide_folder, folder)
    model, processor = load_model_and_processor(folder)
    quantise(model, folder, bits)
    prompts = random_prompts(model, processor, count=8, sides=(60, 250))
    outputs = run(start(folder, max_num_batched_tokens=512, dtype=dtype), prompts, prompt_logprobs=0)
    found = [(output.prompt_logprobs[1:], prompt) for output, prompt in zip(outputs, prompts, strict=True)]
    right = np.median([d for f, prompt in found for d in differences(f, prompt.prompt_log_probs)])
    causal = np.median([d for f, prompt in found for d in differences(f, prompt.causal_log_probs)])
    assert right < tolerance
    assert causal > 3 * right


def quantise(model, folder, bits):
    """Round the weights of a model's layers, and write them to its folder as compressed-tensors does."""
    weights = load_file(folder / "model.safetensors")
    top = 2 ** (bits - 1) - 1
    for name, module in model.model.language_model.layers.named_modules(prefix="model.language_model.layers"):
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = weights.pop(f"{name}.weight")
        groups = weight.view(len(weight), -1, 32 if bits == 4 else weight.shape[1])
        scale = groups.abs().amax(-1, keepdim=True) / top
        rounded = (groups / scale).round()
        module.weight.data = (rounded * scale).view_as(weight)
        rounded = rounded.view_as(weight).to(torch.int8)
        weights[f"{name}.weight_scale"] = scale[..., 0].contiguous()
        if bits == 4:
            from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

            weights[f"{name}.weight_packed"] = pack_to_int32(rounded, bits)
            weights[f"{name}.weight_shape"] = torch.tensor(weight.shape)
        else:
            weights[f"{name}.weight"] = rounded
            module.register_forward_pre_hook(round_input)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": bits, "type": "int", "symmetric": True}
    group = {"targets": ["Linear"], "weights": scheme | {"strategy": "group", "group_size": 32}}
    if bits == 8:
        group["weights"] = scheme | {"strategy": "channel"}
        group["input_activations"] = scheme | {"strategy": "token", "dynamic": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits == 4 else "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def round_input(module, inputs):
    """To 8 bits for each token, as the kernel does."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return ((inputs[0] / scale).round() * scale,)
