"""Training NEO: data, batches, and what each stage trains."""

from neo_hf.training.collators import PackedCollator, PaddedCollator
from neo_hf.training.data import SampleStream, Source, encode_record, load_samples
from neo_hf.training.packing import PackedDataset, fill_rows
from neo_hf.training.stages import prepare_for_stage

__all__ = [
    "PackedCollator",
    "PackedDataset",
    "PaddedCollator",
    "SampleStream",
    "Source",
    "encode_record",
    "fill_rows",
    "load_samples",
    "prepare_for_stage",
]
