"""
Training NEO, in the order in which data passes through: records, shards and sources of them, samples and streams of
these; packing and collators; the stages, the Trainer and its callbacks.
"""

from neo_hf.training.callbacks import LossSpikeError, SampledAnswers, SkipOnLossSpike, StopOnLossSpike
from neo_hf.training.collators import PackedCollator, PaddedCollator
from neo_hf.training.packing import PackedDataset, fill_rows
from neo_hf.training.samples import encode_record, normalize_patches
from neo_hf.training.sources import Source, load_samples
from neo_hf.training.stages import prepare_for_stage
from neo_hf.training.streams import SampleStream, StreamLoader
from neo_hf.training.trainer import NeoTrainer, NonFiniteLossError

__all__ = [
    "LossSpikeError",
    "NeoTrainer",
    "NonFiniteLossError",
    "PackedCollator",
    "PackedDataset",
    "PaddedCollator",
    "SampleStream",
    "SampledAnswers",
    "SkipOnLossSpike",
    "Source",
    "StopOnLossSpike",
    "StreamLoader",
    "encode_record",
    "fill_rows",
    "load_samples",
    "normalize_patches",
    "prepare_for_stage",
]
