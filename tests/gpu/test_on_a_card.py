"""The whole model on a CUDA device: the numbers of a CPU, no reads by the host, training as the recipes do it."""

import contextlib

import pytest
import torch
from helpers import batch, one, random_model, random_prompt, tiny_config
from world import World

from neo_hf import NeoImageProcessor, load_nano
from neo_hf.cache_neo import CACHE_NAME
from neo_hf.streaming import NeoStream
from neo_hf.training import normalize_patches

pytestmark = pytest.mark.gpu
WIDE = {"text_config": {"head_dim": 128, "num_hidden_layers": 2}}  # FlexAttention's kernels as for NEO-2B


def on_cuda(inputs):
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


@contextlib.contextmanager
def no_reads():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def long_prompts():
    """Left-padded, of 1,280 tokens and fewer, with images across blocks of FlexAttention."""
    generator = torch.Generator().manual_seed(4)
    return batch([random_prompt(generator, images, text=40) for images in ([(20, 30), (23, 23)], [(31, 33)])])


@pytest.mark.parametrize("implementation", ["neo", "sdpa", "eager", "flex_attention"])
def test_same_logits_as_on_a_cpu(long_prompts, implementation):
    model = random_model(tiny_config(**WIDE))
    real = long_prompts["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**long_prompts).logits[real]
        model.cuda().set_attn_implementation(implementation)
        found = model(**on_cuda(long_prompts)).logits.cpu()[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_same_gradients_as_on_a_cpu(is_compiled):
    """Of a packed row, through checkpointed layers, which may be compiled one by one."""
    generator = torch.Generator().manual_seed(9)
    prompts = [random_prompt(generator, images, text=40) for images in ([(20, 30), (9, 9)], [(17, 29)])]
    ids, pixels, grids = (torch.cat(parts) for parts in zip(*prompts, strict=True))
    inputs = {"input_ids": ids[None], "labels": ids[None], "pixel_values": pixels, "image_grid_hw": grids}
    lengths = torch.tensor([len(prompt[0]) for prompt in prompts])
    inputs |= {"document_ids": torch.arange(2).repeat_interleave(lengths)[None], "skip_logits": True}
    found = []
    for device in ("cpu", "cuda"):
        model = random_model(tiny_config(**WIDE)).train().to(device)
        if device == "cuda":
            model.gradient_checkpointing_enable()
            for layer in model.get_decoder().layers if is_compiled else ():
                layer.compile()
        loss = model(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}).loss
        loss.backward()
        found.append({"loss": loss.detach().cpu()} | {name: x.grad.cpu() for name, x in model.named_parameters()})
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


def test_autocast_trains_through_flex_attention():
    """Float32 weights in bfloat16 autocast, as the recipes set it: queries, keys and values meet in one dtype."""
    generator = torch.Generator().manual_seed(9)
    inputs = on_cuda(one(random_prompt(generator, [(20, 30), (23, 23)], text=40)))
    inputs |= {"labels": inputs["input_ids"]}
    losses = {}
    for implementation in ("neo", "sdpa"):
        model = random_model(tiny_config(**WIDE), attn_implementation=implementation).train().cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        assert all(x.grad.isfinite().all() for x in model.parameters())
        losses[implementation] = float(loss.detach())
    assert losses["neo"] == pytest.approx(losses["sdpa"], rel=1e-3)


def test_uint8_patches_are_exact():
    processor = NeoImageProcessor()
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, -1)
    assert torch.equal(normalize_patches(levels.cuda(), processor).cpu(), normalize_patches(levels, processor))


def test_decoding_never_waits():
    """A step of `forward()` reads nothing from the card."""
    model = random_model(tiny_config()).cuda()
    inputs = on_cuda(one(random_prompt(torch.Generator().manual_seed(1), [(3, 5), (2, 2)])))
    token = torch.tensor([[3]], device="cuda")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        model(input_ids=token, **{CACHE_NAME: cache})
        with no_reads():
            model(input_ids=token, **{CACHE_NAME: cache})


def test_nano_answers():
    """A batch of images and clips, and a stream, in the words of a CPU."""
    samples = [next(World(3, test=True).stream({task: 1}))["messages"][:1] for task in ("caption", "motion")]
    frames = [part["image"] for part in samples[1][0]["content"] if part["type"] == "image"]
    answers = []
    for device in ("cpu", "cuda"):
        model, processor = load_nano()
        model.to(device)
        inputs = processor.apply_chat_template(
            samples, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs.to(device), max_new_tokens=32, do_sample=False)
        stream = NeoStream(model, processor)
        for number, frame in enumerate(frames):
            stream.add_frame(frame, number)
        answers.append(
            [*processor.batch_decode(ids.cpu()), "".join(stream.ask("Which way does it move?", max_new_tokens=16))]
        )
    assert answers[1] == answers[0]
