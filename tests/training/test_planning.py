"""What a run is said to take, against what tiny runs take."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, random_model, tiny_config
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from neo_hf.training import prepare_for_stage
from neo_hf.training.planning import (
    attention_flops_per_token,
    bytes_saved,
    flops_per_token,
    peak_flops,
    plan_run,
)
from neo_hf.training.stages import STAGES
from neo_hf_cli import main

TEXT = {"num_hidden_layers": 5, "intermediate_size": 160, "num_pre_buffer_layers": 2}


def trained_model(stage, steps=1, **kwargs):
    """A small model after a step of text, with its optimizer."""
    model = random_model(tiny_config(text_config=TEXT, **kwargs), attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(prepare_for_stage(model, stage).values(), foreach=False)
    ids = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model, optimizer, counter.get_flop_counts()["Global"]


def num_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_memory_and_flops(stage, tie):
    model, optimizer, flops = trained_model(stage, tie_word_embeddings=tie)
    plan = plan_run(model.config, stage, 48, bf16=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert plan.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.num_trained == sum(parameter.numel() for parameter in trained)
    assert plan.memory["weights"] == num_bytes(model.parameters())
    assert plan.memory["gradients"] == num_bytes(parameter.grad for parameter in trained)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.memory["optimizer"] == num_bytes(moments)

    assert plan.flops_per_token == flops_per_token(model)
    products = sum(count for name, count in flops.items() if str(name) in ("aten.mm", "aten.addmm"))
    # Norms and biases are counted as if they were products, and the patch embedding as if each token were an image's.
    patches = flops_per_token(model) * 48 - products
    assert 0 < patches < 6 * 48 * 1.05 * sum(p.numel() for p in model.model.patch_embed.parameters())
    scores = sum(count for name, count in flops.items() if str(name) == "aten.bmm")
    # Eager attention computes the half above the diagonal too.
    assert scores == 2 * 48 * attention_flops_per_token(model.config, 24)
    assert plan.seconds(1000, 2, 1e9, 0.5) == pytest.approx(1000 * plan.flops_per_token / 1e9)


def test_sharded_memory():
    """Of FSDP2, with two devices of which one is real."""
    model = random_model(tiny_config(text_config=TEXT))
    whole, plan = (plan_run(model.config, "sft", 48, 2, sharding, bf16=False) for sharding in ("ddp", "fsdp2"))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        sharded = copy.deepcopy(model)
        for layer in sharded.model.language_model.layers:
            fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)))
        fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
        local = [parameter.to_local() for parameter in sharded.parameters()]
    finally:
        dist.destroy_process_group()
    assert plan.memory["weights"] == num_bytes(local)
    for name in ("weights", "gradients", "optimizer"):
        assert 2 * plan.memory[name] == whole.memory[name]
    assert plan_run(model.config, "sft", 48, 6, "hsdp", 3).memory["optimizer"] == -(-whole.memory["optimizer"] // 3)
    zero2, zero3 = (plan_run(model.config, "sft", 48, 2, sharding).memory for sharding in ("zero2", "zero3"))
    assert zero2["weights"] == 2 * zero3["weights"] == whole.memory["weights"] / 2  # bfloat16
    assert zero2["optimizer"] == zero3["optimizer"] == 1.5 * plan.memory["optimizer"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations(checkpointing):
    """Against what a real forward pass keeps, with the default attention."""
    model = random_model(tiny_config(text_config={**TEXT, "hidden_size": 128})).train()
    length = 6000  # long, so that what does not grow with it is small
    memory = plan_run(model.config, "sft", length, bf16=False, gradient_checkpointing=checkpointing).memory
    expected = sum(memory.get(name, 0) for name in ("layer inputs", "layers", "final norm"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    embeds = torch.randn(1, length, 128)
    saved = bytes_saved(model.model.language_model, inputs_embeds=embeds)
    assert saved == pytest.approx(expected, rel=0.1)


def test_errors():
    config = tiny_config()
    for kwargs, message in (
        ({"stage": "rl"}, "got 'rl'"),
        ({"sharding": "fsdp"}, "sharding must be one of ddp, .*, got 'fsdp'"),
        ({"num_devices": 0}, "must be positive, got 0, 8 and 48"),
        ({"num_devices": 12, "sharding": "hsdp"}, "whole machines of 8 devices, got 12"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_run(config, **{"stage": "sft", "num_tokens": 48, **kwargs})
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *map(str, argv)])
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


def test_command(capsys):
    """For the largest model, whose weights nobody allocates here."""
    recipe = ROOT / "examples" / "recipes" / "9b-pretrain.yaml"
    options = ("--recipe", recipe, "--max-length", 34816, "--devices", 128, "--sharding", "hsdp")
    code, out, _ = run(capsys, "Paranioar/NEO1_0-9B-SFT", *options, "--mfu", 0.5, "--gpu", "H200")
    assert code == 0
    assert re.search(r"total +10,246,797,312\n +trained +2,056,061,952 +20.1%, stage pretrain", out)
    assert "of 128 with hsdp, for 1 x 34,816 tokens" in out
    assert re.search(r"weights +5.12 GB", out)
    entries = [float(number) for number in re.findall(r"^  [\w ]+? +([\d.]+) GB", out, re.MULTILINE)]
    assert sum(entries[:-1]) == pytest.approx(entries[-1], abs=0.05)
    tokens = 34816 * 128 * 5  # gradient_accumulation_steps
    flops = 4 * 10_246_797_312 + 2 * 2_056_061_952 - 4 * 151_936 * 4096
    assert f"{tokens:,} tokens" in out
    hours = 200_000 * tokens * flops / (128 * 989e12 * 0.5) / 3600
    assert re.search(rf"stage +{hours:,.1f} h +200,000 steps", out)


def test_documented_output(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "training.md").read_text()
    command, shown = re.search(r"```bash\nneo-hf plan (.*)\n```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    assert run(capsys, *command.split())[:2] == (0, shown)


def test_recipe_with_either_name_of_checkpointing(capsys, tmp_path):
    recipe = (ROOT / "examples" / "recipes" / "2b-sft.yaml").read_text()
    renamed = tmp_path / "renamed.yaml"
    renamed.write_text(recipe.replace("gradient_checkpointing", "activation_checkpointing"))
    off = tmp_path / "off.yaml"
    off.write_text(recipe.replace("gradient_checkpointing: true", "gradient_checkpointing: false"))
    outputs = [
        run(capsys, "nano", "--recipe", path)[1] for path in (ROOT / "examples/recipes/2b-sft.yaml", renamed, off)
    ]
    assert outputs[0] == outputs[1] != outputs[2]


def test_command_refuses(capsys, tmp_path):
    recipe = ROOT / "examples" / "recipes" / "2b-qlora.yaml"
    parallel = tmp_path / "parallel.yaml"
    parallel.write_text("sequence_parallel_size: 4\nmax_length: 256\n")
    for argv, message in (
        ((), "give --max-length or --recipe"),
        (("--recipe", recipe), "2b-qlora.yaml trains adapters"),
        (("--recipe", parallel), "parallel.yaml divides rows among 4 processes"),
        (("--max-length", 256, "--gpu", "T4"), "gpu must be one of A100, .*, got 'T4'"),
        (("--max-length", 256, "--mfu", 40), "mfu must be above 0 and at most 1, got 40"),
    ):
        code, _, err = run(capsys, "nano", *argv)
        assert code == 1
        assert re.search(message, err)
