"""Training NEO: what each stage trains."""

from neo_hf.training.stages import prepare_for_stage

__all__ = ["prepare_for_stage"]
