"""Loading in parts and in other precisions, quantised, exported and compiled."""

import copy

import pytest
import torch
from helpers import batch, one, random_model, random_prompt, run_without_package, tiny_config
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, DynamicCache, GenerationConfig, StaticCache

from neo_hf import NeoForConditionalGeneration, load_nano

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [random_prompt(generator, images) for images in ([(2, 3)], [(1, 2), (2, 2)], [(3, 1)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    text = {"hidden_size": 128, "intermediate_size": 256}
    random_model(tiny_config(text_config=text, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return NeoForConditionalGeneration.from_pretrained(folder).eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


ON_DISK = {f"model.language_model.layers.{i}": "disk" if i else "cpu" for i in range(3)} | {
    name: "cpu"
    for name in ("model.patch_embed", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head")
}


@pytest.mark.parametrize(
    "settings",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": "auto", "max_memory": {"cpu": 500_000}},
        {"device_map": ON_DISK},
        {"low_cpu_mem_usage": True},
    ],
    ids=["cpu", "auto", "memory", "disk", "low memory"],
)
def test_placement(folder, reference, prompts, tmp_path, settings):
    model = NeoForConditionalGeneration.from_pretrained(folder, offload_folder=tmp_path, **settings)
    inputs = batch(prompts)
    assert torch.equal(logits(model, inputs), logits(reference, inputs))
    assert torch.equal(model.generate(**inputs, **GREEDY), reference.generate(**inputs, **GREEDY))
    if settings.get("device_map") == ON_DISK:
        assert model.model.language_model.layers[1].self_attn.q_proj_hw.weight.device.type == "meta"


def test_offloading_with_accelerate(folder, reference, prompts, tmp_path):
    from accelerate import disk_offload

    model = NeoForConditionalGeneration.from_pretrained(folder)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    inputs = batch(prompts)
    assert torch.equal(logits(model, inputs), logits(reference, inputs))


@pytest.mark.parametrize(("dtype", "similarity"), [(torch.bfloat16, 0.999), (torch.float16, 0.99999)])
def test_half_precision(folder, reference, prompts, dtype, similarity):
    model = NeoForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found, expected = logits(model, batch(prompts)), logits(reference, batch(prompts))
    assert found.dtype == dtype
    assert F.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > similarity
    assert model.generate(**batch(prompts), **GREEDY).shape == (3, batch(prompts)["input_ids"].shape[1] + 4)


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    # The default from torchao 0.18 on. Weights of version 1 cannot be saved.
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))


def torchao_int4():
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    settings = quantization.IntxWeightOnlyConfig(torch.int4, granularity=quantization.PerGroup(32))
    return TorchAoConfig(settings)


def bitsandbytes_8bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "similarity"),
    [(torchao_int8, 0.999), (torchao_int4, 0.9), (bitsandbytes_8bit, 0.999), (bitsandbytes_4bit, 0.9)],
)
def test_quantised(folder, reference, prompts, tmp_path, settings, similarity):
    """The decoder's matrices are quantised; patch embedding, token embedding, norms and output head stay."""
    model = NeoForConditionalGeneration.from_pretrained(folder, quantization_config=settings())
    model.save_pretrained(tmp_path)  # bitsandbytes repacks 4-bit weights for CPUs in the first forward pass
    found, expected = logits(model, batch(prompts)), logits(reference, batch(prompts))
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > similarity
    assert model.generate(**batch(prompts), **GREEDY).shape == reference.generate(**batch(prompts), **GREEDY).shape

    again = NeoForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, batch(prompts)), found, rtol=0, atol=1e-4)
    plain = {
        name
        for name, module in model.named_modules()
        if type(weight := getattr(module, "weight", None)) is torch.nn.Parameter and weight.dtype == torch.float32
    }
    layer = "model.language_model.layers.0."
    norms = {f"{layer}self_attn.{qk}_norm{axis}" for qk in "qk" for axis in ("", "_h", "_w")}
    norms |= {f"{layer}input_layernorm", f"{layer}post_attention_layernorm"}
    assert {name for name in plain if name.startswith(layer)} == norms
    assert {name for name in plain if "layers" not in name} == {
        "lm_head",
        "model.language_model.embed_tokens",
        "model.language_model.norm",
        "model.patch_embed.dense_embedding",
        "model.patch_embed.patch_embedding",
    }


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["load_in_8bit=True", 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'])
def test_quantised_folder_as_remote_code(tmp_path, settings):
    """In bfloat16, which bitsandbytes has kernels for on CPUs: saved, and loaded again without this package."""
    pytest.importorskip("bitsandbytes")
    load_nano()[0].save_pretrained(tmp_path / "nano")
    script = f"""
        import bitsandbytes, torch
        from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
        folder, again = sys.argv[1:]
        settings = dict(trust_remote_code=True, dtype=torch.bfloat16)
        quantised = AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig({settings}), **settings
        )
        quantised.save_pretrained(again)
        loaded = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
        plain = AutoModelForImageTextToText.from_pretrained(folder, **settings)
        assert type(loaded).__module__.startswith("transformers_modules"), type(loaded)
        kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
        assert isinstance(loaded.model.language_model.layers[0].self_attn.q_proj_hw, kinds)
        assert loaded.lm_head.weight.dtype == torch.bfloat16
        inputs = {{"input_ids": torch.arange(20)[None]}}
        with torch.no_grad():
            first, second, reference = (model(**inputs).logits.float() for model in (quantised, loaded, plain))
        assert torch.equal(first, second)
        assert 0.99 < torch.cosine_similarity(first.flatten(), reference.flatten(), dim=0) < 0.99999
        print("passed")
    """
    run = run_without_package(script, tmp_path / "nano", tmp_path / "again", cache=tmp_path / "cache")
    assert run.stdout.endswith("passed\n"), run.stderr


AUTO = torch.export.Dim.AUTO


def with_position_ids(model, inputs):
    position_ids = model.model.get_position_ids(inputs["input_ids"], inputs["image_grid_hw"], inputs["attention_mask"])
    return inputs | {"position_ids": position_ids, "use_cache": False}


@pytest.mark.slow
def test_export_of_the_prefill(reference, prompts):
    """Rows, tokens, patches and images are dynamic, images from two on."""
    inputs = with_position_ids(reference, batch(prompts[:2]))
    shapes = {
        "input_ids": {0: AUTO, 1: AUTO},
        "attention_mask": {0: AUTO, 1: AUTO},
        "pixel_values": {0: AUTO},
        "image_grid_hw": {0: AUTO},
        "position_ids": {1: AUTO, 2: AUTO},
        "use_cache": None,
    }
    program = torch.export.export(reference, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for others in (
        inputs,
        with_position_ids(reference, batch(prompts)),
        with_position_ids(reference, one(prompts[1])),
    ):
        there = others["attention_mask"] == 1  # what padding gives is nobody's business
        found, expected = (logits(model, others)[there] for model in (program, reference))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_export_of_a_decoding_step(reference, prompts):
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()

    def step(inputs):
        with torch.no_grad():
            cache = DynamicCache(config=reference.config.text_config)  # which can be exported
            outputs = reference(**inputs, past_key_values=cache)
        tokens = outputs.logits[:, -1:].argmax(-1)
        mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
        position_ids = reference.model.get_position_ids(tokens, None, mask, cache)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}

    inputs = step(batch(prompts[:2]))
    shapes = torch.export.ShapesCollection()
    shapes[inputs["input_ids"]] = {0: AUTO}
    shapes[inputs["attention_mask"]] = {0: AUTO, 1: AUTO}
    shapes[inputs["position_ids"]] = {1: AUTO}
    for layer in inputs["past_key_values"].layers:
        shapes[layer.keys] = shapes[layer.values] = {0: AUTO, 2: AUTO}
    program = torch.export.export(reference, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for rows in (batch(prompts), one(prompts[2])):
        expected = logits(reference, step(rows))
        torch.testing.assert_close(logits(program, step(rows)), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_decoding(reference, prompts):
    """Steps on a static cache compile to one graph, once."""
    inputs = batch(prompts[:2])
    expected = reference.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    step = torch.compile(reference.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=reference.config.text_config, max_cache_len=64)
    with torch.no_grad():
        outputs = reference(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        found = [outputs.logits[:, -1:].argmax(-1)]
        torch._dynamo.utils.counters.clear()
        for _ in range(3):
            mask = F.pad(mask, (0, 1), value=1)
            position_ids = reference.model.get_position_ids(found[-1], None, mask, cache)
            full = F.pad(mask, (0, 64 - mask.shape[1]))
            outputs = step(input_ids=found[-1], attention_mask=full, position_ids=position_ids, past_key_values=cache)
            found.append(outputs.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(found, 1), expected[:, -4:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_export_for_generation(reference, prompts, cache_implementation):
    """transformers' exporter takes generation apart: each of its graphs gives what the model gives."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.exporters.utils import decompose_for_generation

    settings = GenerationConfig(**GREEDY, cache_implementation=cache_implementation)
    inputs = one(prompts[1])
    parts = decompose_for_generation(reference, dict(inputs), settings)
    exported = DynamoExporter().export_for_generation(
        reference, dict(inputs), DynamoConfig(), generation_config=settings
    )
    assert set(exported.components) == set(parts) == {"prefill", "decode"}
    for name, (module, arguments) in parts.items():
        with torch.no_grad():
            expected = module(**copy.deepcopy(arguments)).logits
            for constant in ("use_cache", "return_dict"):
                arguments.pop(constant, None)
            found = exported.components[name].program.module()(**copy.deepcopy(arguments)).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
