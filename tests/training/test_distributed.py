"""examples/train.py in several processes (gloo), under each launcher of the page, learns what it does in one."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors.torch import load_file

from neo_hf import load_nano
from neo_hf.conversion import convert_raw_to_hub
from neo_hf.training import PackedCollator, PackedDataset, SampleStream, Source, load_samples

EXAMPLES = ROOT / "examples"
# accelerate has FSDP and DeepSpeed on accelerators only.
ON_CPU = Path(__file__).with_name("train_on_cpu.py")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29518"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--main_process_port", "29518"]
FSDP2 = ["--config_file", EXAMPLES / "accelerate" / "fsdp2.yaml", "--num_processes", "2"]
HSDP = ["--config_file", EXAMPLES / "accelerate" / "hsdp.yaml", "--num_machines", "1", "--num_processes", "4"]
HSDP += ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"]
LAUNCHERS = {
    "ddp": ([*TORCHRUN, EXAMPLES / "train.py"], ["--ddp_backend", "gloo"]),
    "fsdp2": ([*ACCELERATE, *FSDP2, ON_CPU], []),
    "hsdp": ([*ACCELERATE, *HSDP, ON_CPU], ["--gradient_accumulation_steps", "1"]),  # four processes
    "zero2": ([*TORCHRUN, ON_CPU], ["--deepspeed", EXAMPLES / "accelerate" / "zero2.json"]),
    "zero3": ([*TORCHRUN, ON_CPU], ["--deepspeed", EXAMPLES / "accelerate" / "zero3.json"]),
}
# Groups of two processes that share rows: one of them, which takes all rows of a step, or two.
GROUPS = ["--sequence_parallel_size", "2"]
ONE_GROUP = [*GROUPS, "--per_device_train_batch_size", "2"]
LAUNCHERS |= {
    f"{name}, sequence parallel": (LAUNCHERS[name][0], [*LAUNCHERS[name][1], *ONE_GROUP])
    for name in ("ddp", "zero2", "zero3")
}
LAUNCHERS["fsdp2, sequence parallel"] = ([*ACCELERATE, *FSDP2[:-1], "4", ON_CPU], GROUPS)
# Mid-training trains what SFT does.
CASES = [(stage, launcher) for stage in ("pretrain", "sft") for launcher in LAUNCHERS]
CASES.append(("midtrain", "ddp, sequence parallel"))
ROW = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """
    Four records, each longer than half a row: a step of four rows then has all of them, however many processes share
    it. One is text alone.
    """
    folder = tmp_path_factory.mktemp("data")
    draw, pixels = random.Random(0), np.random.default_rng(0)
    records = []
    for number, sizes in enumerate([[(64, 64)], [(96, 64), (64, 32)], [], [(32, 64)]]):
        images = [f"{number}-{place}.png" for place in range(len(sizes))]
        for name, (width, height) in zip(images, sizes, strict=True):
            Image.fromarray(pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        words = draw.choices(["red", "circle", "at", "left", "yellow", "nothing"], k=56 - 4 * number)
        turns = [("human", "<image>\n" * len(images) + "What changed?"), ("gpt", " ".join(words))]
        turns = [{"from": role, "value": text} for role, text in turns]
        records.append(({"images": images} if images else {}) | {"conversations": turns})
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = load_samples([Source(str(folder / "train.jsonl"), root=folder)], load_nano()[1])
    assert all(ROW / 2 < len(sample["input_ids"]) <= ROW for sample in samples)
    return folder


def train(command, data, stage, out, rows, *options):
    """Losses and weights after a few steps in float32."""
    settings = {
        "model": "nano",
        "train_data": data / "train.jsonl",
        "data_root": data,
        "max_length": ROW,
        "min_pixels": 1024,
        "max_pixels": 16384,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "max_grad_norm": 0.1,  # so that gradients are clipped
        "adam_epsilon": 1,  # a small one makes the first step the sign of each gradient, which rounding may decide
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "output_dir": out,
    }
    argv = [
        EXAMPLES / "recipes" / f"2b-{stage}.yaml",
        *(x for name, value in settings.items() for x in (f"--{name}", value)),
    ]
    run = subprocess.run(
        [sys.executable, *map(str, [*command, *argv, *options])],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [entry["loss"] for entry in log(out) if "loss" in entry], load_file(out / "model.safetensors")


def log(out):
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def alone(request, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    return request.param, *train([EXAMPLES / "train.py"], data, request.param, out, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "launcher"), CASES, indirect=["alone"], scope="module")
def test_several_processes(alone, data, tmp_path, launcher):
    stage, expected_losses, expected_weights = alone
    command, options = LAUNCHERS[launcher]
    losses, weights = train(command, data, stage, tmp_path / "out", 1, *options)
    assert losses == pytest.approx(expected_losses, rel=0, abs=1e-5)
    assert losses[0] > losses[-1] + 0.01
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "num_readers", "bf16"),
    [
        ("ddp", 2, False),
        ("ddp, sequence parallel", 1, False),
        ("fsdp2", 2, True),
        ("zero2", 2, True),
    ],
)
def test_loss_per_source(data, tmp_path, launcher, num_readers, bf16):
    """
    Over the documents of all rows, whichever process read them. In bfloat16, where the model itself computes in it,
    weights and losses are not rounded.
    """
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / "few.jsonl", tmp_path / "many.jsonl"]
    for file, part in zip(files, (lines[:1], lines[1:]), strict=True):
        file.write_text("".join(part))
    command, options = LAUNCHERS[launcher]
    command = ["bf16" if bf16 and part == "no" else part for part in command]  # what accelerate launch gets
    options = [*options, "--train_data", *files, "--learning_rate", "0", "--logging_steps", "3", "--seed", "7"]
    train(command, data, "sft", tmp_path / "out", 1, *options, "--bf16", bf16)
    [logged] = [entry for entry in log(tmp_path / "out") if "loss" in entry]

    model, processor = load_nano()
    model = model.to(torch.bfloat16 if bf16 else torch.float32)
    processor.image_processor.min_pixels, processor.image_processor.max_pixels = 1024, 16384
    collator = PackedCollator(processor.tokenizer.pad_token_id, ROW)
    sums = {str(file): torch.zeros(2) for file in files}
    steps = torch.zeros(3, 2)
    for reader in range(num_readers):
        sources = [Source(str(file), root=data) for file in files]
        rows = PackedDataset(SampleStream(sources, processor, seed=7, normalize=True), ROW)
        rows.load_state_dict(rows.initial_state(reader, num_readers))
        for number, [sample] in enumerate(itertools.islice(rows, 12 // num_readers)):
            weight = (sample["labels"][1:] != -100).sum() ** 0.5
            batch = collator([[sample]])
            del batch["sample_names"], batch["source_ids"]
            with torch.no_grad():
                loss = model(**batch, skip_logits=True).loss.item()
            weighted = torch.tensor([loss, 1]) * weight
            sums[str(files[sample["source"]])] += weighted
            steps[number * num_readers // 4] += weighted
    for name, (loss, weight) in sums.items():
        assert logged[f"loss/{name}"] == pytest.approx((loss / weight).item(), rel=1e-5)
    losses, weights = steps.T
    assert logged["loss"] == pytest.approx((losses / weights).mean().item(), rel=1e-5)


@pytest.mark.slow
def test_skips_a_loss_spike_in_all_processes(tmp_path):
    """Even though only one of them sees it."""
    worker = Path(__file__).with_name("skip_loss_spike.py")
    run = subprocess.run(
        [sys.executable, *TORCHRUN, str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])},
        cwd=ROOT,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for rank in range(2):
        changed = json.loads((tmp_path / f"changed_{rank}.json").read_text())
        assert changed == [True, True, True, True, True, False, True]
    assert run.stderr.count("Its update is skipped") == 1


@pytest.mark.slow
@pytest.mark.parametrize("alone", ["pretrain", "sft"], indirect=True, scope="module")
def test_sharded_checkpoints(alone, data, tmp_path):
    """torch.distributed.checkpoint: resumed from, and converted; the end is a whole folder."""
    stage, _, expected = alone
    command, options = LAUNCHERS["fsdp2"]
    command = [*command[:-1], "--fsdp_state_dict_type", "SHARDED_STATE_DICT", command[-1]]
    options = [*options, "--save_strategy", "steps", "--save_steps", "2"]
    whole = tmp_path / "whole"
    _, weights = train(command, data, stage, whole, 1, *options)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)
    checkpoint = whole / "checkpoint-2"
    assert (checkpoint / "pytorch_model_fsdp_0" / ".metadata").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = train(command, data, stage, tmp_path / "resumed", 1, *options, "--resume_from_checkpoint", checkpoint)[1]
    for name, tensor in weights.items():
        assert torch.equal(resumed[name], tensor), name
    convert_raw_to_hub(checkpoint, tmp_path / "converted")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert torch.equal(converted.pop("lm_head.weight"), converted["model.language_model.embed_tokens.weight"])  # tied
    assert converted.keys() == weights.keys()
    differences = [(converted[name] - weights[name]).abs().max() for name in weights]
    assert 0 < max(differences) < 0.1  # a step later


@pytest.mark.slow
def test_a_sequence_parallel_group_reads_as_one_process(data, tmp_path):
    """It counts rows and bad records once, and one process continues from its checkpoint."""
    records = (data / "train.jsonl").read_text().splitlines()
    bad = json.dumps({"image": "absent.png", "conversations": json.loads(records[0])["conversations"]})
    for image in data.glob("*.png"):
        (tmp_path / image.name).symlink_to(image)
    (tmp_path / "train.jsonl").write_text("\n".join([*records[:2], bad, *records[2:]]) + "\n")
    command, options = LAUNCHERS["ddp, sequence parallel"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--save_only_model", "false"]
    losses, weights = train(command, tmp_path, "sft", whole, 1, *options, *saving)
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    # One bad record for four good ones, of which 64 wait to be packed besides the four rows of each step.
    assert all(16 <= entry["num_skipped"] <= 20 for entry in history if "loss" in entry)
    assert round(history[-1]["train_runtime"] * history[-1]["train_samples_per_second"], 1) == 3 * 4
    assert "| rows per step | 4 |" in (whole / "README.md").read_text()

    checkpoint = ["--resume_from_checkpoint", whole / "checkpoint-2"]
    resumed_losses, resumed_weights = train([EXAMPLES / "train.py"], tmp_path, "sft", resumed, 2, *checkpoint)
    assert resumed_losses == pytest.approx(losses, rel=0, abs=1e-5)
    for name, expected in weights.items():
        torch.testing.assert_close(resumed_weights[name], expected, rtol=0, atol=1e-5, msg=name)
