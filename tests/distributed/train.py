"""Train a tiny model on made-up samples: torchrun --nproc-per-node 2 train.py OUT TRAINING_ARGUMENTS_AS_JSON"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import random_model, tiny_config
from test_training import SGD, make_samples, train
from torch.distributed.fsdp import FSDPModule

from neo_hf import loss_neo


def main(folder, arguments):
    loss_neo.CHUNK_TOKENS = 7
    model = random_model(tiny_config(tie_word_embeddings=True))
    trainer = train(model, make_samples(16), folder, **SGD, **arguments)
    assert isinstance(trainer.model, FSDPModule) == bool(arguments.get("fsdp"))
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
