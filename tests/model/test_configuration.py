import pytest

from neo_hf import NeoConfig, NeoTextConfig


def test_defaults_are_neo_2b():
    config = NeoConfig()
    text = config.text_config
    assert (text.num_hidden_layers, text.num_pre_buffer_layers, text.hidden_size, text.head_dim) == (40, 12, 2048, 128)
    assert config.tie_word_embeddings is True
    assert (config.image_token_id, config.image_start_token_id, config.image_end_token_id) == (151669, 151670, 151671)
    assert {axis: rope["rope_theta"] for axis, rope in text.rope_parameters.items()} == {
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
        ({"image_token_id": 200_000}, r"image_token_id must be .* below vocab_size \(151936\), got 200000"),
        ({"image_token_id": 151_670}, r"must differ, got \[151670, 151670, 151671\]"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        NeoConfig(**fields)


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match="is no NEO: model_type must be 'neo' or 'neo_chat', got 'qwen3'"):
        NeoConfig.from_pretrained(tmp_path)
