"""
Training NEO, in the order in which data passes through: records, sources, samples and streams of them; packing and
collators; the stages, the Trainer and its callback.
"""

from neo_hf.training.callbacks import SampledAnswers
from neo_hf.training.collators import PackedCollator, PaddedCollator
from neo_hf.training.packing import PackedDataset, fill_rows
from neo_hf.training.samples import encode_record
from neo_hf.training.sources import Source, load_samples
from neo_hf.training.stages import prepare_for_stage
from neo_hf.training.streams import SampleStream
from neo_hf.training.trainer import NeoTrainer, NonFiniteLossError

__all__ = [
    "NeoTrainer",
    "NonFiniteLossError",
    "PackedCollator",
    "PackedDataset",
    "PaddedCollator",
    "SampleStream",
    "SampledAnswers",
    "Source",
    "encode_record",
    "fill_rows",
    "load_samples",
    "prepare_for_stage",
]
