"""Raw checkpoints are read as they are."""

import json
import logging
import shutil

import pytest
import torch
from helpers import EOS, GOLDEN, IMAGE, IMAGE_START, golden_case
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from neo_hf import NeoConfig, NeoForConditionalGeneration, NeoModel
from neo_hf.raw import raw_config_to_neo

RAW = GOLDEN / "neo_tiny" / "raw"
IDS = {"image_token_id": IMAGE, "image_start_token_id": IMAGE_START}


@pytest.fixture
def raw(tmp_path):
    """A copy of the raw checkpoint that a test may change: folder, config, tensors."""
    folder = tmp_path / "raw"
    shutil.copytree(RAW, folder)
    return folder, json.loads((RAW / "config.json").read_text()), load_file(RAW / "model.safetensors")


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, auto_class=NeoForConditionalGeneration):
    """Load and check that every key of the checkpoint and of the model was accounted for."""
    model, info = auto_class.from_pretrained(folder, **IDS, output_loading_info=True)
    assert type(model) is NeoForConditionalGeneration
    assert not any(info.values()), info
    return model.eval()


def check_logits(model, golden):
    inputs, expected = golden_case(golden, "two_images")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[0], expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "auto_class",
    [NeoForConditionalGeneration, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM],
)
def test_auto_classes(golden, auto_class):
    check_logits(load(RAW, auto_class), golden)


def test_trusted_remote_code_of_the_raw_folder_is_not_run(golden):
    model = AutoModel.from_pretrained(RAW, **IDS, trust_remote_code=True)
    check_logits(model.eval(), golden)


def test_shards(raw, golden):
    folder, _, tensors = raw
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_logits(load(folder), golden)

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match=r"model-00002-of-00002\.safetensors"):
        load(folder)


def test_bin(raw, golden):
    folder, _, tensors = raw
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    check_logits(load(folder), golden)


def test_pickle_with_code_is_refused(raw):
    folder, _, tensors = raw
    (folder / "model.safetensors").unlink()

    class Code:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({**tensors, "language_model.model.norm.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl"):
        load(folder)


def test_base_model(tmp_path):
    """`NeoModel` gets the same weights, and saves them under its own names; only the head is left out."""
    model, info = NeoModel.from_pretrained(RAW, **IDS, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert not info["missing_keys"]
    whole = load(RAW)
    assert model.state_dict().keys() == whole.model.state_dict().keys()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for saved, expected in ((model, model.state_dict()), (NeoModel(model.config), model.state_dict())):
        saved.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == expected.keys()


def test_rotary_frequencies_are_ignored(raw):
    folder, _, tensors = raw
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert NeoForConditionalGeneration.from_pretrained(folder).can_generate()


@pytest.mark.parametrize("tied_by_config", [True, False])
def test_absent_head_is_the_embedding(raw, tied_by_config, caplog):
    folder, config, tensors = raw
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["llm_config"]["tie_word_embeddings"] = tied_by_config
    write_config(folder, config)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = load(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "MISSING" not in caplog.text  # the load report would say that the head is newly initialised
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.lm_head.weight, tensors["language_model.model.embed_tokens.weight"])

    model.save_pretrained(folder / "saved")
    assert "lm_head.weight" not in load_file(folder / "saved" / "model.safetensors")
    again = load(folder / "saved")
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_saving_writes_the_models_own_names(golden, tmp_path):
    load(RAW).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"model", "lm_head"}
    assert "model.patch_embed.dense_embedding.weight" in names
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "neo"
    check_logits(load(tmp_path), golden)


def test_config(raw):
    folder, config, _ = raw
    expected = NeoConfig.from_pretrained(RAW)
    assert expected.model_type == "neo"
    assert (expected.image_token_id, expected.image_start_token_id) == (None, None)  # outside this vocabulary
    assert expected.text_config.num_pre_buffer_layers is None
    assert expected.tie_word_embeddings is False
    assert AutoConfig.from_pretrained(RAW).to_diff_dict() == expected.to_diff_dict()

    # As a trailing comma in the released code writes them.
    config["vision_config"] |= {"llm_hidden_size": [64], "downsample_ratio": [0.5]}
    write_config(folder, config)
    assert NeoConfig.from_pretrained(folder).vision_config.to_diff_dict() == expected.vision_config.to_diff_dict()

    # What a file leaves out are the released values, not transformers' own.
    for section, names in {
        "llm_config": ("rope_theta", "rope_theta_hw"),
        "vision_config": ("rope_theta_vision",),
    }.items():
        config[section] = {name: value for name, value in config[section].items() if name not in names}
    rope = NeoConfig.from_dict(config).text_config.rope_parameters
    assert [rope[axis]["rope_theta"] for axis in ("temporal", "height", "width")] == [1e6, 1e4, 1e4]
    assert NeoConfig.from_dict(config).vision_config.rope_parameters["rope_theta"] == 1e4

    # As training writes them.
    del config["template"], config["downsample_ratio"], config["vision_config"]["downsample_ratio"]
    config |= {"img_start_token_id": IMAGE_START, "img_context_token_id": IMAGE}
    config["llm_config"] |= {"extra_num_layers": 2, "rope_theta": 5e6, "rope_theta_hw": 1e5}
    config["vision_config"]["rope_theta_vision"] = 1000
    write_config(folder, config)
    trained = NeoConfig.from_pretrained(folder)
    assert (trained.image_token_id, trained.image_start_token_id) == (IMAGE, IMAGE_START)
    assert trained.text_config.num_pre_buffer_layers == 2
    # As newer versions of transformers write it.
    config["llm_config"] |= {"rope_parameters": {"rope_type": "default", "rope_theta": 3e6}}
    assert NeoConfig.from_dict(config).text_config.rope_parameters["temporal"]["rope_theta"] == 3e6
    rope = trained.text_config.rope_parameters
    thetas = {axis: rope[axis]["rope_theta"] for axis in ("temporal", "height", "width")}
    assert thetas == {"temporal": 5e6, "height": 1e5, "width": 1e5}
    assert trained.vision_config.rope_parameters["rope_theta"] == 1000
    assert trained.vision_config.spatial_merge_size == 2


@pytest.mark.parametrize(("layers", "pre_buffer"), [(40, 12), (42, 6), (41, None)])
def test_released_depths(raw, layers, pre_buffer):
    _, config, _ = raw
    config["llm_config"] |= {"num_hidden_layers": layers, "vocab_size": 151_936}
    read = NeoConfig.from_dict(config)
    assert read.text_config.num_pre_buffer_layers == pre_buffer
    assert (read.image_token_id, read.image_start_token_id, read.image_end_token_id) == (151669, 151670, 151671)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("llm_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "no rope scaling, got .*yarn"),
        ("llm_config", {"layer_types": ["sliding_attention"] * 5}, "sliding_attention"),
        ("llm_config", {"hidden_act": "foo"}, "foo"),
        ("vision_config", {"downsample_ratio": 0}, "1 over a whole number, got 0"),
        ("vision_config", {"downsample_ratio": 0.3}, "1 over a whole number, got 0.3"),
        (None, {"vision_config": None}, "needs a 'vision_config' section"),
        ("llm_config", {"model_type": "llama"}, "'llama'"),
        ("llm_config", {"use_sliding_window": True}, "sliding window"),
        ("llm_config", {"rope_scaling": {"type": "yarn"}}, "yarn"),
        ("llm_config", {"head_dim": 30}, "head_dim must be a positive multiple of 4 .* got 30"),
        ("llm_config", {"extra_num_layers": 9}, r"between 0 and num_hidden_layers \(5\), got 9"),
        ("vision_config", {"llm_hidden_size": 65}, "llm_hidden_size is 65, but llm_config.hidden_size is 64"),
        ("vision_config", {"hidden_size": 46}, "got 46"),
    ],
)
def test_bad_config(raw, section, change, message):
    _, config, _ = raw
    (config[section] if section else config).update(change)
    with pytest.raises(ValueError, match=message):
        NeoConfig(**raw_config_to_neo(config))


def test_truncated_weights(raw):
    folder, _, _ = raw
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"weights in .*raw cannot be read, it may be truncated"):
        load(folder)


@pytest.mark.parametrize("model_class", [NeoForConditionalGeneration, NeoModel])
def test_mismatched_weights(raw, model_class):
    folder, config, _ = raw
    config["llm_config"]["intermediate_size"] = 161
    write_config(folder, config)
    with pytest.raises(RuntimeError, match=r"(?i)size|shape|mismatch"):
        model_class.from_pretrained(folder)


@pytest.mark.parametrize("model_class", [NeoForConditionalGeneration, NeoModel])
@pytest.mark.parametrize("change", ["missing", "left over"])
def test_every_key_is_accounted_for(raw, change, model_class):
    folder, _, tensors = raw
    name = "language_model.model.layers.1.self_attn.q_proj_hw.weight"
    tensors[name if change == "left over" else "spare"] = tensors.pop(name) if change == "missing" else torch.ones(2)
    if change == "left over":
        tensors["spare"] = torch.ones(1)
        tensors[name] = load_file(RAW / "model.safetensors")[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit its configuration: .*'spare'"):
        model_class.from_pretrained(folder)


def test_generation_config(raw):
    model = load(raw[0])
    assert model.generation_config.eos_token_id == EOS
