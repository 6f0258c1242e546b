"""Run examples/train.py where accelerate expects accelerators: FSDP and DeepSpeed themselves also run on CPUs."""

import importlib.util
import os
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import DistributedType, PartialState

spec = importlib.util.spec_from_file_location("train", Path(__file__).parents[2] / "examples" / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
parse_arguments = train.parse_arguments


def parse_then_distribute(argv):
    arguments = parse_arguments(argv)
    if arguments[-1].deepspeed:
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


train.parse_arguments = parse_then_distribute
train.main()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # at Python's own end, threads of Gloo that still hold tensors can abort the process
