import json
import re

import pytest
from helpers import num_examples
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_hf import NeoConfig, NeoTextConfig
from neo_hf.configuration_neo import LIMITS

AXES = ("temporal", "height", "width")


def test_defaults_are_neo_2b():
    config = NeoConfig()
    text = config.text_config
    assert (text.num_hidden_layers, text.num_pre_buffer_layers, text.hidden_size, text.head_dim) == (40, 12, 2048, 128)
    assert config.tie_word_embeddings is True
    assert (config.image_token_id, config.image_start_token_id, config.image_end_token_id) == (151669, 151670, 151671)
    assert {axis: text.rope_parameters[axis]["rope_theta"] for axis in AXES} == {
        "temporal": 1e6,
        "height": 1e4,
        "width": 1e4,
    }


def test_the_documented_preset_is_neo_9b():
    config = NeoConfig(
        text_config={
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 42,
            "num_attention_heads": 32,
        },
        tie_word_embeddings=False,
    )
    assert config.text_config.num_pre_buffer_layers == 6
    assert config.text_config.tie_word_embeddings is False


def test_theta_of_the_llm():
    assert NeoTextConfig(rope_theta=5e6).rope_parameters["temporal"]["rope_theta"] == 5e6


def test_save_and_load(tmp_path):
    config = NeoConfig(text_config={"num_hidden_layers": 7, "num_pre_buffer_layers": 3}, image_token_id=5)
    config.save_pretrained(tmp_path)
    again = NeoConfig.from_pretrained(tmp_path)
    assert again.text_config.num_pre_buffer_layers == 3
    assert again.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {"head_dim": 30}}, "head_dim must be a positive multiple of 4.* got 30"),
        ({"text_config": {"num_attention_heads": 5}}, "got 5 and 8"),
        ({"text_config": {"num_pre_buffer_layers": 41}}, r"between 0 and num_hidden_layers \(40\), got 41"),
        ({"text_config": {"intermediate_size": 0}}, "intermediate_size must be positive, got 0"),
        ({"text_config": {"rms_norm_eps": -1.0}}, "rms_norm_eps must be positive, got -1"),
        ({"text_config": {"attention_dropout": 2.0}}, "attention_dropout must be from 0 to 1, got 2"),
        ({"text_config": {"hidden_act": "foo"}}, "hidden_act .*'foo'"),
        ({"text_config": {"rope_parameters": {"temporal": {"rope_theta": 1e6}}}}, "'temporal', 'height', 'width'"),
        ({"vision_config": {"hidden_size": 30}}, "multiple of 4 .* got 30"),
        ({"vision_config": {"patch_size": 0}}, "patch_size must be positive, got 0"),
        ({"vision_config": {"min_pixels": 9, "max_pixels": 4}}, "got 9 and 4"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers must be at most 1024, got 1000000"),
        ({"text_config": {"vocab_size": 10**15}}, r"vocab_size must be at most 16777216, got 1000000000000000"),
        ({"text_config": {"head_dim": 2**20}}, "head_dim must be at most 16384, got 1048576"),
        ({"text_config": {"rms_norm_eps": float("inf")}}, r"rms_norm_eps must be at most 1\.0, got inf"),
        ({"text_config": {"rms_norm_eps": float("nan")}}, "rms_norm_eps must be positive, got nan"),
        ({"text_config": {"initializer_range": float("nan")}}, r"initializer_range must be from 0 to 100\.0, got nan"),
        ({"text_config": {"initializer_range": -0.02}}, r"initializer_range must be from 0 to 100\.0, got -0\.02"),
        ({"text_config": {"attention_dropout": float("nan")}}, "attention_dropout must be from 0 to 1, got nan"),
        ({"text_config": {"rope_parameters": 7}}, "rope_parameters must be a dict, got 7"),
        ({"text_config": [1]}, r"text_config must be a dict, got \[1\]"),
        ({"vision_config": "neo"}, "vision_config must be a dict, got 'neo'"),
        ({"vision_config": {"hidden_size": 2**30}}, "hidden_size must be at most 131072, got 1073741824"),
        ({"vision_config": {"spatial_merge_size": 10**9}}, "spatial_merge_size must be at most 64, got 1000000000"),
        ({"vision_config": {"max_pixels": 10**15}}, r"max_pixels must be at most 2147483648, got 1000000000000000"),
        ({"image_token_id": 200_000}, r"image_token_id must be .* below vocab_size \(151936\), got 200000"),
        ({"image_token_id": 151_670}, "must differ, got .*'image_start_token_id': 151670"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        NeoConfig(**fields)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_config", "hidden_size", "64"),
        ("text_config", "num_hidden_layers", 4.0),
        ("text_config", "vocab_size", float("nan")),
        ("text_config", "rms_norm_eps", "1e-6"),
        ("vision_config", "patch_size", True),
        ("vision_config", "max_pixels", float("inf")),
        (None, "image_token_id", "<img>"),
    ],
)
def test_values_of_another_type(section, field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{field}'.*{value}"):
        NeoConfig(**({field: value} if section is None else {section: {field: value}}))


@pytest.mark.parametrize("theta", [float("nan"), float("inf"), 0, -1e6, "1e6", True, None, [1e6], 10**400])
def test_thetas_that_mean_nothing(theta):
    plain = {axis: {"rope_type": "default", "rope_theta": 1e4} for axis in AXES}
    for fields in (
        {"text_config": {"rope_theta": theta}},
        {"text_config": {"rope_parameters": plain | {"width": {"rope_theta": theta}}}},
        {"vision_config": {"rope_parameters": {"rope_theta": theta}}},
    ):
        with pytest.raises(
            ValueError,
            match=r"'rope_theta': positive number up to 1e\+30.* got .*'rope_theta': " + re.escape(repr(theta)),
        ):
            NeoConfig(**fields)


NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([1, 4, 8, 64, 2**40, 10**400]),
    st.floats(),
    st.sampled_from(["64", "", None, True, [8], {}]),
)
TEXT_FIELDS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
]
TEXT_FIELDS += ["intermediate_size", "rms_norm_eps", "initializer_range", "attention_dropout", "rope_theta"]
VISION_FIELDS = ["patch_size", "spatial_merge_size", "num_channels", "hidden_size", "min_pixels", "max_pixels"]


@settings(max_examples=num_examples(200))
@given(
    st.dictionaries(st.sampled_from(TEXT_FIELDS), NUMBERS, max_size=2),
    st.dictionaries(st.sampled_from([*VISION_FIELDS, "rope_theta"]), NUMBERS, max_size=2),
    st.dictionaries(
        st.sampled_from(["image_token_id", "image_start_token_id", "image_end_token_id"]), NUMBERS, max_size=1
    ),
)
def test_any_configuration_is_refused_or_sound(text, vision, ids):
    """What is accepted has sizes within limits and reads back as it was written; all else is refused by name."""
    message = config = None
    try:
        config = NeoConfig(text_config=text, vision_config=vision, **ids)
    except (ValueError, StrictDataclassError) as error:
        message = str(error)
    if config is None:
        names = ["rope_parameters" if name == "rope_theta" else name for name in (*text, *vision, *ids)]
        assert any(name in message for name in [*names, "The ids of NEO's image tokens must differ"])
        return
    for part in (config.text_config, config.vision_config):
        for name, limit in LIMITS.items():
            assert 0 <= getattr(part, name, 0) <= limit
    again = NeoConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(
        ValueError, match=r"not a NEO checkpoint: model_type must be one of \['neo', 'neo_chat'\], got 'qwen3'"
    ):
        NeoConfig.from_pretrained(tmp_path)


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}


@pytest.mark.parametrize("section", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("built", [True, False])
def test_rope_scaling_is_refused(section, name, built):
    """When it is given and when it is set later, on the whole model and on either part."""
    config = NeoConfig()
    part = config if section is None else getattr(config, section)
    with pytest.raises(ValueError, match=r"NEO has no rope scaling.*yarn"):
        setattr(part, name, YARN) if built else type(part)(**{name: YARN})


@pytest.mark.parametrize(
    "change",
    [{"height": YARN}, {"height": {"rope_theta": 1e4, "factor": 2.0}}, {"height": None}, {"rope_type": "yarn"}],
)
def test_scaling_of_one_axis_is_refused(change):
    config = NeoConfig().text_config
    before = config.rope_parameters
    with pytest.raises(ValueError, match="NEO has no rope scaling"):
        config.rope_parameters = before | change
    assert config.rope_parameters == before


def test_rope_type_stands_where_it_is_looked_for(tmp_path, caplog):
    """Per axis, where transformers validates it, and beside the axes, where engines do that know no axes."""
    config = NeoConfig(text_config={"rope_parameters": {axis: {"rope_theta": 7e4} for axis in AXES}})
    config.validate()
    config.save_pretrained(tmp_path)
    plain = {"rope_type": "default", "rope_theta": 7e4}
    for read in (config, NeoConfig.from_pretrained(tmp_path)):
        assert read.text_config.rope_parameters == {"rope_type": "default", **dict.fromkeys(AXES, plain)}
    assert config.text_config.nested_rope_parameter_keys(config.text_config.rope_parameters) == [*AXES]
    assert not caplog.records
