"""Training NEO: what each stage trains, and a Trainer."""

from neo_hf.training.stages import prepare_for_stage
from neo_hf.training.trainer import NeoTrainer, NonFiniteLossError

__all__ = ["NeoTrainer", "NonFiniteLossError", "prepare_for_stage"]
