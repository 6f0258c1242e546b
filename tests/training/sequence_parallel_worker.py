"""Run by `torchrun`: a sequence-parallel group of two computes what one process computes."""

import copy
import itertools
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist
from helpers import IMAGE, random_model, random_prompt, tiny_config

from neo_hf.training import PackedCollator, PaddedCollator
from neo_hf.training.sequence_parallel import SequenceParallel

SIZE, ROW = 2, 64
TOLERANCE = 1e-5


def make_batch(packed: bool, loss_weighting: str, seed: int) -> dict:
    """Two rows. In the middle of the first one is an image, in the middle of the second one a label."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for images, text in [([(2, 3)], 4), ([(3, 5), (1, 2)], 4), ([], 20), ([(2, 2)], 15)]:
        ids, pixels, grids = random_prompt(generator, images, text)
        labels = torch.where(ids == IMAGE, -100, ids)
        labels[: 4 if images else 1] = -100
        samples.append({"input_ids": ids, "labels": labels} | ({"pixel_values": pixels} if images else {}))
        samples[-1] |= {"image_grid_hw": grids} if images else {}
    if packed:
        return PackedCollator(0, ROW, loss_weighting)([samples[:2], samples[2:]])
    batch = PaddedCollator(0, loss_weighting, pad_to_multiple_of=SIZE)(samples[1:3])
    assert batch["input_ids"].shape[1] == len(samples[1]["input_ids"]) + 1
    return batch


def step(model, batch: dict, total: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**batch, num_items_in_batch=total, skip_logits=True).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def check(implementation: str, num_key_value_heads: int, packed: bool, loss_weighting: str, checkpointing: bool):
    text = {"num_key_value_heads": num_key_value_heads}
    model = random_model(tiny_config(text_config=text), attn_implementation=implementation).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    # The rows of another group are other rows.
    batch = make_batch(packed, loss_weighting, seed=dist.get_rank() // SIZE)
    total = float(batch["loss_weight"].sum())
    expected_loss, expected = step(copy.deepcopy(model), batch, total)

    parallel = SequenceParallel(model, SIZE)
    middle = batch["input_ids"].shape[1] // SIZE
    assert (batch["input_ids"][0, middle - 1 : middle + 1] == IMAGE).all()
    assert batch["labels"][1, middle] >= 0
    lengths = []
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    loss, gradients = step(model, parallel.slice_targets(batch, IMAGE), total)
    assert set(lengths) == {middle}
    dist.all_reduce(loss, group=parallel.group)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=TOLERANCE)
    for name, gradient in gradients.items():
        dist.all_reduce(gradient, group=parallel.group)
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=TOLERANCE, msg=name)

    # Evaluation is not divided.
    model.eval()
    with torch.no_grad():
        assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


def check_errors():
    three = random_model(tiny_config(text_config={"num_attention_heads": 3, "num_key_value_heads": 3}))
    with pytest.raises(ValueError, match="divide the number of attention heads, 3, got 2"):
        SequenceParallel(three, SIZE)
    with pytest.raises(ValueError, match=rf"divide the number of processes, {dist.get_world_size()}, got 3"):
        SequenceParallel(None, 3)
    parallel = SequenceParallel(random_model(tiny_config()), SIZE)
    batch = make_batch(True, "token", seed=0)
    cut = {name: batch[name][:, :-1] for name in ("input_ids", "labels", "loss_weight", "document_ids")}
    with pytest.raises(ValueError, match="tokens in a row, 63, got 2"):
        parallel.slice_targets(cut, IMAGE)
    with pytest.raises(RuntimeError, match="2 processes of a sequence-parallel group have different rows"):
        parallel.slice_targets(make_batch(True, "token", seed=dist.get_rank()), IMAGE)


dist.init_process_group("gloo")
for implementation, num_key_value_heads in itertools.product(["neo", "sdpa", "eager"], [1, 2]):
    check(implementation, num_key_value_heads, packed=True, loss_weighting="square", checkpointing=False)
    check(implementation, num_key_value_heads, packed=False, loss_weighting="token", checkpointing=True)
check("neo", 4, packed=True, loss_weighting="sample", checkpointing=True)
check_errors()
dist.barrier()
if dist.get_rank() == 0:
    print("done", flush=True)
dist.destroy_process_group()
os._exit(0)  # at Python's own end, threads of Gloo that still hold tensors can abort the process
