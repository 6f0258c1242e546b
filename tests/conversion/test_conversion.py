import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import EOS, GOLDEN, ROOT, golden_case, random_model, tiny_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from neo_hf import NeoConfig, NeoForConditionalGeneration, NeoProcessor
from neo_hf.conversion import (
    convert_hub_to_raw,
    convert_raw_to_hub,
    extract_pre_buffer,
    graft_pre_buffer,
    init_from_qwen3,
)
from neo_hf.raw import raw_to_neo_name
from neo_hf.tokenization import NEO_SPECIAL_TOKENS
from neo_hf_cli import main

RAW = GOLDEN / "neo_tiny" / "raw"
QWEN3 = GOLDEN / "qwen3_init" / "qwen3"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    """A tokenizer of words whose special tokens have the ids of the golden model."""
    words = {f"w{i}": i for i in range(501)} | {"<pad>": 504, "<|im_end|>": 505}
    for i, token in enumerate(NEO_SPECIAL_TOKENS):  # the first three at 501 to 503, the others in place of words
        words.pop(f"w{487 + i}", None)
        words[token] = 501 + i if i < 3 else 487 + i
    words |= {f"v{i}": 487 + i for i in range(3)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="<|im_end|>",
        pad_token="<pad>",
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    shutil.copytree(RAW, folder)
    return folder


def change_config(folder, **sections):
    config = json.loads((folder / "config.json").read_text())
    for name, change in sections.items():
        config[name] = config.get(name, {}) | change if isinstance(change, dict) else change
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_all(folder):
    """All tensors of a folder of safetensors."""
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def check_logits(folder, golden):
    inputs, expected = golden_case(golden, "two_images")
    ids = {"image_token_id": 501, "image_start_token_id": 502}
    model = NeoForConditionalGeneration.from_pretrained(folder, **ids).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[0], expected["logits"], rtol=0, atol=1e-4)


def test_there_and_back(golden, tmp_path):
    missing = convert_raw_to_hub(RAW, tmp_path / "hub", verify=True)
    assert missing == ["tokenizer", "processor", "chat template"]
    check_logits(tmp_path / "hub", golden)
    convert_hub_to_raw(tmp_path / "hub", tmp_path / "raw")
    assert (tmp_path / "raw" / WEIGHTS).read_bytes() == (RAW / WEIGHTS).read_bytes()
    check_logits(tmp_path / "raw", golden)
    assert NeoConfig.from_pretrained(tmp_path / "raw").to_diff_dict() == NeoConfig.from_pretrained(RAW).to_diff_dict()
    raw_config = json.loads((tmp_path / "raw" / "config.json").read_text())
    released = json.loads((RAW / "config.json").read_text())
    for section in ("vision_config", "llm_config"):
        differing = {
            key
            for key in released[section].keys() & raw_config[section]
            if released[section][key] != raw_config[section][key]
        }
        assert not differing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "raw"]  # nothing unfinished left


def test_complete_repository(tmp_path, tokenizer, photographs):
    """With the real vocabulary, bf16 and several shards; then published, as far as can be without a Hub."""
    model = random_model(tiny_config(151_936)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "made")
    convert_hub_to_raw(tmp_path / "made", tmp_path / "raw")
    tokenizer.save_pretrained(tmp_path / "raw")
    before = read_all(tmp_path / "raw")
    assert convert_raw_to_hub(tmp_path / "raw", tmp_path / "hub", max_shard_size="200KB", verify=True) == []
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 2
    convert_hub_to_raw(tmp_path / "hub", tmp_path / "again", max_shard_size="3MB")
    assert_same(read_all(tmp_path / "again"), before)
    assert (tmp_path / "again" / "tokenizer.json").exists()

    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "raw" in card.content
    assert "neo-hf 0." in card.content
    processor = NeoProcessor.from_pretrained(tmp_path / "hub")
    converted = NeoForConditionalGeneration.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    inputs = processor(text="<image>\nHi", images=photographs[0], return_tensors="pt", max_pixels=65536)
    expected = model.to(torch.float32).generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(converted.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


def test_card_of_a_conversion(tmp_path):
    """Hub id and licence as given; the licence otherwise that of the source's card."""
    shutil.copytree(RAW, tmp_path / "raw")
    (tmp_path / "raw" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    convert_raw_to_hub(tmp_path / "raw", tmp_path / "kept", repo_id="someone/neo")
    card = ModelCard.load(tmp_path / "kept" / "README.md")
    assert 'model_id = "someone/neo"' in card.text
    assert "# neo\n" in card.text
    assert card.data.license == "mit"
    hub = str(tmp_path / "hub")
    assert run("convert", str(tmp_path / "raw"), hub, "--repo-id", "a/b", "--license", "cc-by-4.0") == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert 'model_id = "a/b"' in card.text
    assert card.data.license == "cc-by-4.0"
    with pytest.raises(ValueError, match="a/b/c"):
        convert_raw_to_hub(tmp_path / "raw", tmp_path / "never", repo_id="a/b/c")
    assert not (tmp_path / "never").exists()


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    return stop.value.code


def test_command_line(tmp_path, capsys, golden):
    hub, back = str(tmp_path / "hub"), str(tmp_path / "raw")
    assert run("convert", str(RAW), hub, "--dtype", "float32", "--num-pre-buffer-layers", "2", "--verify") == 0
    out = capsys.readouterr().out
    assert "Verified: all tensors" in out
    assert "has no tokenizer, processor, chat template: pass the folder of a tokenizer with --tokenizer" in out
    assert 'model_id = "your-username/hub"' in (tmp_path / "hub" / "README.md").read_text()
    assert NeoConfig.from_pretrained(hub).text_config.num_pre_buffer_layers == 2
    check_logits(hub, golden)
    assert run("export", hub, back) == 0
    assert_same(read_all(back), read_all(RAW))
    assert run("export", hub, back) == 1
    assert "raw exists; --force replaces it" in capsys.readouterr().err
    (tmp_path / "raw" / "stale.txt").touch()
    assert run("export", hub, back, "--force") == 0
    assert "Verified" not in capsys.readouterr().out
    assert not (tmp_path / "raw" / "stale.txt").exists()
    for script, arguments in (("convert_raw_to_hub", [str(RAW), str(tmp_path / "by script")]),):
        path = ROOT / "conversion" / f"{script}.py"
        subprocess.run([sys.executable, path, *arguments], check=True, capture_output=True)
        assert_same(read_all(tmp_path / "by script"), read_all(hub))


# Sources


def test_pickle_of_an_old_torch(raw, tmp_path, golden):
    """Not a zip file, so it cannot be mapped into memory."""
    tensors = load_file(raw / WEIGHTS)
    (raw / WEIGHTS).unlink()
    torch.save(tensors, raw / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_raw_to_hub(raw, tmp_path / "hub", verify=True)
    check_logits(tmp_path / "hub", golden)


def test_head_tied_in_the_llm_section_only(raw, tmp_path):
    change_weights(raw, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    change_config(raw, llm_config={"tie_word_embeddings": True}, tie_word_embeddings=False)
    assert NeoConfig.from_pretrained(raw).tie_word_embeddings is True


def test_outputs_that_would_harm(raw, tmp_path):
    """A source is never replaced, whatever is given; a file is no folder; links stay links."""
    for out in (raw, tmp_path):
        with pytest.raises(ValueError, match="would replace its own source"):
            convert_raw_to_hub(raw, out, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        convert_raw_to_hub(raw, tmp_path / "file", force=True)
    with pytest.raises(ValueError, match="int8"):
        convert_raw_to_hub(raw, tmp_path / "out", dtype=torch.int8)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert_raw_to_hub(raw, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "raw", "real"]


def test_shards_pickles_and_dtypes(raw, tmp_path, golden):
    tensors = load_file(raw / WEIGHTS)
    (raw / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, raw / file)
        weight_map |= dict.fromkeys(part, file)
    (raw / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_raw_to_hub(raw, tmp_path / "hub", verify=True)
    check_logits(tmp_path / "hub", golden)

    convert_raw_to_hub(raw, tmp_path / "half", dtype=torch.bfloat16, max_shard_size="200KB", verify=True)
    expected = {raw_to_neo_name(name): tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    assert_same(read_all(tmp_path / "half"), expected)
    assert NeoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["absent", "equal"])
def test_tied_head(raw, tmp_path, head):
    embedding = "language_model.model.embed_tokens.weight"

    def tie(tensors):
        del tensors["language_model.lm_head.weight"]
        if head == "equal":
            tensors["language_model.lm_head.weight"] = tensors[embedding].clone()

    change_weights(raw, tie)
    change_config(raw, llm_config={"tie_word_embeddings": True})
    convert_raw_to_hub(raw, tmp_path / "hub", verify=True)
    model = NeoForConditionalGeneration.from_pretrained(tmp_path / "hub")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    convert_hub_to_raw(tmp_path / "hub", tmp_path / "back")
    assert_same(read_all(tmp_path / "back"), read_all(raw))


def test_absent_head_of_an_untied_configuration(raw, tmp_path):
    change_weights(raw, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    convert_raw_to_hub(raw, tmp_path / "hub", verify=True)
    assert NeoConfig.from_pretrained(tmp_path / "hub").tie_word_embeddings is True


def test_lists_in_the_configuration(raw, tmp_path, golden):
    change_config(raw, vision_config={"llm_hidden_size": [64], "downsample_ratio": [0.5]})
    convert_raw_to_hub(raw, tmp_path / "hub")
    check_logits(tmp_path / "hub", golden)


def torchrun(script, *arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    command += [str(Path(__file__).parent / script), *map(str, arguments)]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_fsdp_folder(tmp_path):
    """As the Trainer leaves it: checkpoint-N/pytorch_model_fsdp_0 with config.json above."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    torchrun("save_fsdp.py", RAW, folder / "pytorch_model_fsdp_0")
    NeoConfig.from_pretrained(RAW).save_pretrained(tmp_path)
    convert_raw_to_hub(folder, tmp_path / "hub", verify=True)
    assert_same(read_all(tmp_path / "hub"), {raw_to_neo_name(n): t for n, t in read_all(RAW).items()})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_folder(tmp_path, stage):
    pytest.importorskip("deepspeed")
    folder = tmp_path / "checkpoint-7"
    torchrun("save_zero.py", RAW, folder, stage, DS_ACCELERATOR="cpu")
    shutil.copy(RAW / "config.json", folder)
    convert_raw_to_hub(folder, tmp_path / "hub", verify=True)
    assert_same(read_all(tmp_path / "hub"), {raw_to_neo_name(n): t for n, t in read_all(RAW).items()})


# Bad input: refused by name, nothing written


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])


def shards(folder, **change):
    """Two shards with an index, `weight_map` entries changed."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:10]}, folder / "a.safetensors")
    save_file({name: tensors[name] for name in names[10:]}, folder / "b.safetensors")
    weight_map = {name: "a.safetensors" if i < 10 else "b.safetensors" for i, name in enumerate(names)}
    index = {"weight_map": weight_map | {names[i]: file for i, file in change.get("moved", {}).items()}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return names, tensors


def duplicate(folder):
    names, tensors = shards(folder)
    save_file({name: tensors[name] for name in names[9:]}, folder / "b.safetensors")


class Code:
    def __reduce__(self):
        return (print, ("code ran",))


def pickle_with(value):
    def make(folder):
        (folder / WEIGHTS).unlink()
        content = [value] if isinstance(value, int) else {"language_model.model.norm.weight": value}
        torch.save(content, folder / "pytorch_model.bin")

    return make


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"model\.safetensors cannot be read, it may be truncated"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no weights"),
        (lambda f: (f / "config.json").unlink(), "holds a config.json"),
        (lambda f: (f / "config.json").write_text("{"), "valid JSON"),
        (lambda f: change_config(f, llm_config={"head_dim": 30}), "head_dim must be .* got 30"),
        (lambda f: shards(f, moved={3: "c.safetensors"}), r"c\.safetensors .* is missing"),
        (lambda f: shards(f, moved={3: "../a.safetensors"}), r"'\.\./a\.safetensors'.*same folder as their index"),
        (lambda f: shards(f, moved={3: "b.safetensors"}), "disagree on these tensors: language_model"),
        (duplicate, "repeats tensors of an earlier shard: language_model"),
        (lambda f: (f / f"{WEIGHTS}.index.json").write_text("[]"), r"index\.json must hold a JSON object, got \[\]"),
        (lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": []}'), "is not a shard index"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "qwen3"}'),
            "config.json is not a NEO configuration",
        ),
        (lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)})), "F8_E4M3"),
        (lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(2))), "left over: extra"),
        (lambda f: change_weights(f, lambda t: t.pop(NORM)), r"missing: model\.language_model\.norm\.weight"),
        (
            lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(65)})),
            r"norm\.weight: \(65,\), expected \(64,\)",
        ),
        (lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(64).int()})), "int32, expected floating"),
        (
            lambda f: change_weights(f, lambda t: t[NORM].fill_(float("nan"))),
            r"not finite:\n  model\.language_model\.norm",
        ),
        (lambda f: change_config(f, llm_config={"tie_word_embeddings": True}), "lm_head and embed_tokens differ"),
        (pickle_with(Code()), r"pytorch_model\.bin cannot be read as plain tensors"),
        (pickle_with(3), "must hold tensors by name, got a list"),
        (pickle_with("text"), "holds more than plain tensors: language_model"),
    ],
)
def test_bad_source(raw, tmp_path, spoil, message, capfd):
    spoil(raw)
    with pytest.raises(ValueError, match=message):
        convert_raw_to_hub(raw, tmp_path / "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert "code ran" not in capfd.readouterr().out


def test_all_problems_come_in_one_error(raw, tmp_path):
    def spoil(tensors):
        del tensors[NORM]
        tensors["extra"] = torch.ones(1)
        name = "language_model.model.layers.2.mlp.up_proj.weight"
        tensors[name] = tensors[name].T.contiguous()

    change_weights(raw, spoil)
    with pytest.raises(ValueError, match="does not fit") as raised:
        convert_raw_to_hub(raw, tmp_path / "hub")
    for part in ("missing: model.language_model.norm.weight", "left over: extra", "(64, 160), expected (160, 64)"):
        assert part in str(raised.value)


def test_bad_tokenizer(raw, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        convert_raw_to_hub(raw, tmp_path / "hub", tokenizer=tmp_path)
    tokenizer.save_pretrained(raw)
    with pytest.raises(ValueError, match=r"151682 tokens .* but the vocabulary of the model has 512"):
        convert_raw_to_hub(raw, tmp_path / "hub")
    (raw / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"The tokenizer in .* cannot be read"):
        convert_raw_to_hub(raw, tmp_path / "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_token_ids_come_from_the_tokenizer(raw, tmp_path, small_tokenizer):
    assert convert_raw_to_hub(raw, tmp_path / "hub", tokenizer=small_tokenizer) == []
    config = NeoConfig.from_pretrained(tmp_path / "hub")
    assert (config.image_token_id, config.image_start_token_id, config.image_end_token_id) == (501, 502, 503)
    assert NeoForConditionalGeneration.from_pretrained(tmp_path / "hub").generation_config.eos_token_id == EOS
    processor = NeoProcessor.from_pretrained(tmp_path / "hub")
    assert set(NEO_SPECIAL_TOKENS) <= set(processor.tokenizer.get_vocab())
    assert processor.tokenizer.padding_side == "left"
    change_config(raw, img_context_token_id=500)
    with pytest.raises(ValueError, match="image_token_id is 500 in the configuration, but 501 in the tokenizer"):
        convert_raw_to_hub(raw, tmp_path / "other", tokenizer=small_tokenizer)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """No output or a complete one, and a second run succeeds."""
    random_model(tiny_config(151_936, text_config={"num_hidden_layers": 24})).save_pretrained(tmp_path / "made")
    convert_hub_to_raw(tmp_path / "made", tmp_path / "raw")
    expected = read_all(tmp_path / "made")
    script = f"""
import neo_hf.conversion.target, time
write = neo_hf.conversion.target.write_shards
def slow(folder, infos, read, size):
    def wait(name):
        time.sleep(0.01)
        return read(name)
    print("started", flush=True)
    write(folder, infos, wait, size)
neo_hf.conversion.target.write_shards = slow
neo_hf.conversion.convert_raw_to_hub({str(tmp_path / "raw")!r}, {str(tmp_path / "hub")!r}, max_shard_size="4MB")
"""
    outcomes = set()
    for delay in (0.0, 1.0, 3.0):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == b"started\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        complete = (tmp_path / "hub").exists()
        outcomes.add(complete)
        if complete:
            assert_same(read_all(tmp_path / "hub"), expected)
            shutil.rmtree(tmp_path / "hub")
    assert False in outcomes
    convert_raw_to_hub(tmp_path / "raw", tmp_path / "hub")
    assert_same(read_all(tmp_path / "hub"), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "made", "raw"]


# Qwen3 to NEO


def test_init_from_qwen3(tmp_path):
    init_from_qwen3(QWEN3, tmp_path / "neo", num_pre_buffer_layers=2)
    found = read_all(tmp_path / "neo")
    for name, tensor in load_file(GOLDEN / "qwen3_init" / "post_llm_expected.safetensors").items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(found[raw_to_neo_name("language_model." + name)], tensor), name
    model, info = NeoForConditionalGeneration.from_pretrained(tmp_path / "neo", output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.text_config.num_pre_buffer_layers == 2
    for name, parameter in model.pre_buffer.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.018 < parameter.std() < 0.022, name
    weight, bias = (found[f"model.patch_embed.patch_embedding.{part}"] for part in ("weight", "bias"))
    for parameter in (weight, bias):
        assert parameter.min() < 0
        assert 0.9 / 768**0.5 < parameter.abs().max() <= 1 / 768**0.5

    init_from_qwen3(QWEN3, tmp_path / "again", num_pre_buffer_layers=2)
    assert_same(read_all(tmp_path / "again"), found)
    init_from_qwen3(QWEN3, tmp_path / "other", num_pre_buffer_layers=2, seed=1)
    assert not torch.equal(read_all(tmp_path / "other")["model.patch_embed.patch_embedding.weight"], weight)


def test_random_weights_follow_the_initializer_range(tmp_path):
    shutil.copytree(QWEN3, tmp_path / "llm")
    change_config(tmp_path / "llm", initializer_range=0.1)
    init_from_qwen3(tmp_path / "llm", tmp_path / "neo", num_pre_buffer_layers=2)
    found = read_all(tmp_path / "neo")
    layers = [found[f"model.language_model.layers.{i}.mlp.up_proj.weight"] for i in range(2)]
    assert all(0.09 < layer.std() < 0.11 for layer in layers)
    assert not torch.equal(*layers)
    assert 4.5 / 768**0.5 < found["model.patch_embed.patch_embedding.weight"].abs().max() <= 5 / 768**0.5


def test_without_pre_buffer_it_writes_what_qwen3_writes(tmp_path):
    assert run("init", str(QWEN3), str(tmp_path / "neo"), "--num-pre-buffer-layers", "0") == 0
    recorded = load_file(GOLDEN / "qwen3_init" / "qwen3_text.safetensors")
    model = NeoForConditionalGeneration.from_pretrained(tmp_path / "neo").eval()
    llm = Qwen3ForCausalLM.from_pretrained(QWEN3).eval()
    with torch.no_grad():
        logits = model(input_ids=recorded["input_ids"]).logits
        torch.testing.assert_close(logits, llm(input_ids=recorded["input_ids"]).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits.reshape(recorded["qwen3_logits"].shape), recorded["qwen3_logits"], rtol=0, atol=1e-5
    )


def test_bad_llm(tmp_path):
    with pytest.raises(ValueError, match=r"must be a Qwen3 LLM .* got 'neo_chat'"):
        init_from_qwen3(RAW, tmp_path / "neo", num_pre_buffer_layers=1)
    shutil.copytree(QWEN3, tmp_path / "llm")
    change_weights(tmp_path / "llm", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        init_from_qwen3(tmp_path / "llm", tmp_path / "neo", num_pre_buffer_layers=1)
    assert not (tmp_path / "neo").exists()


def test_pre_buffer(tmp_path):
    """Lifted out of one NEO and grafted onto an LLM, it is what it was."""
    init_from_qwen3(QWEN3, tmp_path / "neo", num_pre_buffer_layers=2, seed=3, vision_config={"hidden_size": 48})
    assert run("pre-buffer", "extract", str(tmp_path / "neo"), str(tmp_path / "asset")) == 0
    lifted = read_all(tmp_path / "asset")
    assert {name.split(".")[3] for name in lifted if "layers" in name} == {"0", "1"}
    assert not any("embed_tokens" in name for name in lifted)
    assert "SHA-256" in (tmp_path / "asset" / "README.md").read_text()
    assert run("pre-buffer", "graft", str(tmp_path / "asset"), str(QWEN3), str(tmp_path / "grafted")) == 0
    assert_same(read_all(tmp_path / "grafted"), read_all(tmp_path / "neo"))
    assert NeoConfig.from_pretrained(tmp_path / "grafted").vision_config.hidden_size == 48

    # The asset brings the height and width axes along, which an LLM does not have.
    config = json.loads((tmp_path / "asset" / "config.json").read_text())
    for axis in ("height", "width"):
        config["text_config"]["rope_parameters"][axis]["rope_theta"] = 5000.0
    (tmp_path / "asset" / "config.json").write_text(json.dumps(config))
    graft_pre_buffer(tmp_path / "asset", QWEN3, tmp_path / "other axes")
    rope = NeoConfig.from_pretrained(tmp_path / "other axes").text_config.rope_parameters
    assert [rope[axis]["rope_theta"] for axis in ("temporal", "height", "width")] == [1e6, 5e3, 5e3]

    shutil.copytree(QWEN3, tmp_path / "wide")
    change_config(tmp_path / "wide", intermediate_size=256)
    with pytest.raises(ValueError, match="intermediate_size: 128 and 256"):
        graft_pre_buffer(tmp_path / "asset", tmp_path / "wide", tmp_path / "out")
    with pytest.raises(ValueError, match="is not a pre-Buffer"):
        graft_pre_buffer(tmp_path / "neo", QWEN3, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown depth"):
        extract_pre_buffer(RAW, tmp_path / "out")
    assert not (tmp_path / "out").exists()
