"""Run by `torchrun`: every way to spread NEO over processes gives what one process gives. Arguments: folder, cases."""

import copy
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist
from helpers import batch, one, random_prompt

from neo_hf import NeoForConditionalGeneration

FOLDER, *CASES = sys.argv[1:]
TOLERANCE = 1e-4


def load(**kwargs):
    return NeoForConditionalGeneration.from_pretrained(FOLDER, **kwargs)


def check_gradients(model, reference):
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if isinstance(grad, torch.distributed.tensor.DTensor):
            grad = grad.full_tensor()
        torch.testing.assert_close(grad, expected[name.removeprefix("module.")], rtol=0, atol=TOLERANCE, msg=name)


def data_parallel(reference, inputs, prompts):
    """Each process has one prompt; gradients are those of the mean of their losses."""
    model = torch.nn.parallel.DistributedDataParallel(load())
    mine = one(prompts[dist.get_rank()])
    model(**mine, labels=mine["input_ids"]).loss.backward()
    losses = [reference(**row, labels=row["input_ids"]).loss for row in map(one, prompts)]
    (sum(losses) / len(losses)).backward()
    check_gradients(model, reference)


def fully_sharded(reference, inputs, prompts):
    from torch.distributed.fsdp import fully_shard

    model = load()
    for module in (*model.model.language_model.layers, model.model.patch_embed, model):
        fully_shard(module)
    weight = model.model.language_model.layers[0].self_attn.q_proj_hw.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0]
    outputs = model(**inputs, labels=inputs["input_ids"])
    expected = reference(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=TOLERANCE)
    outputs.loss.backward()
    expected.loss.backward()
    check_gradients(model, reference)


def tensor_parallel(reference, inputs, prompts):
    model = load(tp_plan="auto")
    weight = model.model.language_model.layers[0].self_attn.q_proj_hw.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, rtol=0, atol=TOLERANCE)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), reference.generate(**inputs, **settings))


def zero_3(reference, inputs, prompts):
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # With a small eps, Adam's first step would be the sign of each gradient, and rounding would decide that of those
    # near 0.
    settings = {"lr": 1e-2, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-3}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {**settings, "torch_adam": True}},
    }
    keep = HfDeepSpeedConfig(config)  # from here on, models are sharded as they are loaded
    model = load()
    assert model.lm_head.weight.numel() == 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    optimizer = torch.optim.AdamW(reference.parameters(), **settings)
    rows = [one(prompt) for prompt in prompts]
    mine = rows[dist.get_rank()]
    for _ in range(3):
        loss = engine(**mine, labels=mine["input_ids"]).loss
        losses = [reference(**row, labels=row["input_ids"]).loss for row in rows]
        torch.testing.assert_close(loss, losses[dist.get_rank()], rtol=0, atol=1e-5)
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    del keep


def main():
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    prompts = [random_prompt(generator, images) for images in ([(2, 3)], [(1, 2), (2, 2)])]
    reference = load()
    for case in CASES:
        globals()[case](copy.deepcopy(reference), batch(prompts), prompts)
        dist.barrier()
        if os.environ["RANK"] == "0":
            print("done", case, flush=True)
    dist.destroy_process_group()
    os._exit(0)  # at Python's own end, threads of Gloo that still hold tensors can abort the process


if __name__ == "__main__":
    main()
