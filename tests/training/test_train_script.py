"""examples/train.py: from files to a folder that answers."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, random_model, run_without_package, tiny_config
from PIL import Image
from safetensors.torch import load_file

from neo_hf import NeoForConditionalGeneration, load_nano
from neo_hf.publishing import check_complete

SCRIPT = ROOT / "examples" / "train.py"
RECIPES = sorted(SCRIPT.parent.glob("recipes/*.yaml"))

CAPTIONS = [
    "Temple roofs with upturned corners under a clear sky.",
    "Dark green trees in front of a wooden hall.",
    "A stone terrace seen from below.",
    "Red columns carry the upper floor.",
    "The yellow heart of a dahlia.",
    "Pink petals, sharply in focus.",
    "Blurred leaves behind the flower.",
    "Half in shade, the lower edge of a blossom.",
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory, photographs, processor):
    """Eight real photographs with captions, and a small model that knows nothing."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number, caption in enumerate(CAPTIONS):
        left, top = 150 * (number % 4), 180 * (number % 2)
        photographs[number // 4].crop((left, top, left + 160, top + 128)).save(folder / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
        records.append({"image": f"{number}.jpg", "conversations": turns})
    (folder / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = {"hidden_size": 128, "num_hidden_layers": 2}
    random_model(tiny_config(151_936, text_config=text)).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def arguments(data, out, **options):
    options = {
        "model": data / "model",
        "random_weights": True,
        "train_data": data / "captions.jsonl",
        "data_root": data,
        "max_pixels": 16384,
        "output_dir": out,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_data": data / "captions.jsonl",
        "save_strategy": "no",
        **options,
    }
    return [str(x) for name, value in options.items() for x in (f"--{name}", value)]


def run(script, monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    script.main()


def losses(checkpoint):
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_learns_photographs_by_heart(script, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    steps = 100
    argv = arguments(
        data,
        out,
        max_steps=steps,
        per_device_train_batch_size=1,  # a row holds all eight
        max_length=320,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=steps,
        num_answers=2,
    )
    run(script, monkeypatch, argv)
    history = json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    assert next(entry["eval_loss"] for entry in history if "eval_loss" in entry) < 0.05

    page = (out / "answers" / f"step-{steps}.md").read_text()
    assert all(page.count(f"\n{caption}\n") == 2 for caption in CAPTIONS[:2])  # as answered and as in the data
    with Image.open(out / "answers" / "0-0.png") as seen, Image.open(data / "0.jpg") as file:
        expected = file.resize(seen.size, Image.Resampling.BICUBIC)
        difference = torch.tensor(list(seen.tobytes())).float() - torch.tensor(list(expected.tobytes())).float()
    assert difference.abs().max() <= 1

    answers = """
        import sys
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
        for image in sys.argv[2:]:
            content = [{"type": "image", "path": image}, {"type": "text", "text": "Describe it."}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            print("ANSWER", processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
    """
    for folder in (out, out / f"checkpoint-{steps}"):
        images = [data / f"{number}.jpg" for number in range(8)]
        answered = run_without_package(answers, folder, *images, cache=tmp_path / "cache")
        assert re.findall("ANSWER (.*)", answered.stdout) == CAPTIONS, answered.stderr


@pytest.mark.slow
def test_resumes_after_a_kill(script, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several threads may add in another order in another run
    command = [sys.executable, str(SCRIPT)]
    options = {
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-3,
    }
    subprocess.run([*command, *arguments(data, tmp_path / "whole", **options)], check=True, capture_output=True)

    argv = arguments(data, tmp_path / "killed", **options)
    process = subprocess.Popen([*command, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while script.last_checkpoint(tmp_path / "killed") is None:
        assert process.poll() is None, process.stdout.read().decode()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # As if it had been killed while it wrote the next one.
    (tmp_path / "killed" / "checkpoint-6").mkdir(exist_ok=True)
    (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").write_text('{"log_hist')
    assert script.last_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-3")

    subprocess.run([*command, *argv], check=True, capture_output=True)
    assert losses(tmp_path / "killed" / "checkpoint-9") == losses(tmp_path / "whole" / "checkpoint-9")
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_lora(script, data, tmp_path, monkeypatch, quantized):
    """Adapters alone are trained; they, and a whole model with them merged in, are saved."""
    peft = pytest.importorskip("peft")
    if quantized:
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    options = {"model": "nano", "max_steps": 3, "lora_rank": 4, "learning_rate": 1e-2, "random_weights": False}
    options |= {"load_in_4bit": quantized, "num_answers": 1, "eval_strategy": "steps", "eval_steps": 3}
    run(script, monkeypatch, arguments(data, out, **options))

    before, after = load_nano()[0], NeoForConditionalGeneration.from_pretrained(out)
    changed = {
        name
        for (name, new), old in zip(after.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "q_proj_hw", "k_proj_hw"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert len(changed) == 9 * 6
    adapted = peft.PeftModel.from_pretrained(before, out / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(adapted(ids).logits, after(ids).logits, rtol=0, atol=1e-4)
    card = (out / "README.md").read_text()
    assert "sft, LoRA of rank 4" in card
    assert ("4-bit" in card) == quantized
    check_complete(out)


@pytest.mark.parametrize(("packed", "epochs", "steps"), [(False, 1.5, 6), (True, 3, 3)])
def test_epochs(script, data, tmp_path, monkeypatch, packed, epochs, steps):
    """Eight records, one per row or all of them in a row of their length; steps of two rows or one."""
    options = {"num_train_epochs": epochs, "per_device_train_batch_size": 1, "learning_rate": 0}
    options |= {"max_length": 320} if packed else {"gradient_accumulation_steps": 2}
    drawn = []
    encode = script.SampleStream.__iter__

    def draw(stream):
        for sample in encode(stream):
            drawn.append(stream.sources[sample["source"]].name)
            yield sample

    monkeypatch.setattr(script.SampleStream, "__iter__", draw)
    lines = (data / "captions.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / "few.jsonl", tmp_path / "many.jsonl"]
    for file, part in zip(files, (lines[:1], lines[1:]), strict=True):
        file.write_text("".join(part))
    run(script, monkeypatch, [*arguments(data, tmp_path / "out", **options), "--train_data", *map(str, files)])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == steps
    assert state["epoch"] == 1
    assert drawn.count(str(files[1])) > 2 * drawn.count(str(files[0]))  # by their size


def test_recipes(script, tmp_path):
    sizes, stages = {"2b", "9b"}, {"pretrain", "midtrain", "sft"}
    assert {path.stem for path in RECIPES} == {"2b-qlora", *(f"{size}-{stage}" for size in sizes for stage in stages)}
    for path in RECIPES:
        argv = [str(path), "--model", "NEO", "--train_data", "a.jsonl", "b.jsonl", "--output_dir", str(tmp_path)]
        model, data, training = script.parse_arguments([*argv, "--bf16", "false", "--learning_rate", "1"])
        assert model.stage == path.stem.split("-")[1].replace("qlora", "sft")
        assert (model.lora_rank is not None) == model.load_in_4bit == (path.stem == "2b-qlora")
        assert data.train_data == ["a.jsonl", "b.jsonl"]
        assert training.learning_rate == 1  # options follow the recipe
        assert training.adam_beta2 == 0.95
        assert data.max_length >= (4096 if model.lora_rank else 16384)


def test_nano_and_its_own_attention(script, tmp_path):
    argv = ["--model", "nano", "--train_data", "a.jsonl", "--output_dir", str(tmp_path)]
    model, processor = script.load(script.parse_arguments(argv)[0])
    assert model.config._attn_implementation == "neo"
    assert processor.image_processor.patch_size == 8
    for implementation in ("eager", "sdpa"):
        model, _ = script.load(script.parse_arguments([*argv, "--attn_implementation", implementation])[0])
        assert model.config._attn_implementation == implementation


def test_bad_arguments(script, data, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        run(script, monkeypatch, arguments(data, tmp_path, train_data="absent.jsonl", max_steps=1))
    argv = [*arguments(data, tmp_path, max_steps=1), "--train_weights", "1", "2"]
    with pytest.raises(ValueError, match="2 for 1 sources"):
        run(script, monkeypatch, argv)
    with pytest.raises(ValueError, match=r"more than 8 tokens.*captions\.jsonl:1"):
        run(script, monkeypatch, arguments(data, tmp_path, max_steps=1, max_length=8))
    with pytest.raises(ValueError, match=r"No sample .* fits a row of 8 tokens"):
        run(script, monkeypatch, arguments(data, tmp_path, max_length=8))
    (tmp_path / "bad.jsonl").write_text('{"image": "absent.jpg", "caption": "Lost."}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl has no good record: Cannot read the image .*absent\.jpg"):
        run(script, monkeypatch, arguments(data, tmp_path, train_data=tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match="stage sft, got 'pretrain'"):
        run(script, monkeypatch, arguments(data, tmp_path, max_steps=1, stage="pretrain", lora_rank=4))
    with pytest.raises(ValueError, match="without --lora_rank"):
        run(script, monkeypatch, arguments(data, tmp_path, max_steps=1, load_in_4bit=True))
    with pytest.raises(ValueError, match="sequence_parallel_size must divide the number of processes, 1, got 2"):
        run(script, monkeypatch, arguments(data, tmp_path, max_steps=1, sequence_parallel_size=2))
    with pytest.raises(ValueError, match="sequence_parallel_size must divide the number of processes, 1, got 0"):
        run(script, monkeypatch, arguments(data, tmp_path, max_steps=1, sequence_parallel_size=0))
