"""Training NEO: data, batches, what each stage trains, and a Trainer."""

from neo_hf.training.callbacks import SampledAnswers
from neo_hf.training.collators import PackedCollator, PaddedCollator
from neo_hf.training.data import SampleStream, Source, encode_record, load_samples
from neo_hf.training.packing import PackedDataset, fill_rows
from neo_hf.training.stages import prepare_for_stage
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
