"""Train a tiny model on random samples: torchrun distributed_train.py OUT TRAINING_ARGUMENTS_AS_JSON"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import deepspeed
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from helpers import random_model, tiny_config
from test_training import SGD, collate, make_samples, training_arguments
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled

from neo_hf import NeoForConditionalGeneration
from neo_hf.loss_neo import NeoOutputHead
from neo_hf.training import NeoTrainer, SampleStream, Source, prepare_for_stage


def main(folder, kwargs):
    NeoOutputHead.chunk_tokens = 7
    # Loaded after the arguments, as in examples/train.py: under ZeRO-3, its parameters are then partitioned.
    with tempfile.TemporaryDirectory() as initial:
        random_model(tiny_config(tie_word_embeddings=True)).save_pretrained(initial)
        arguments = training_arguments(folder, **SGD, **kwargs)
        if arguments.deepspeed:
            deepspeed.init_distributed("gloo")  # accelerate does this on accelerators only
        model = NeoForConditionalGeneration.from_pretrained(initial)
    assert is_deepspeed_zero3_enabled() == any(p.numel() == 0 for p in model.parameters())
    assert prepare_for_stage(model, "sft").keys() == dict(model.named_parameters()).keys()
    if arguments.fsdp:
        # accelerate has FSDP on accelerators only; FSDP itself runs anywhere.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    samples = SampleStream([Source(make_samples(16))], processor=None)
    trainer = NeoTrainer(model, arguments, data_collator=collate, train_dataset=samples)
    trainer.train()
    assert isinstance(trainer.model, FSDPModule) == bool(arguments.fsdp)
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    dist.destroy_process_group()
