"""What is in training data, before a run: lengths, fill of the rows, bad records and steps."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from neo_hf.loss_neo import IGNORE_INDEX
from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.packing import count_bytes, fill_rows
from neo_hf.training.records import FORMATS
from neo_hf.training.sources import Source

# Formats of records by the key that tells them apart, in the order in which they are looked for.
KEYS = (*(key for key, _, _ in FORMATS), "texts", "caption", "text", "input_ids")


@dataclass
class SourceReport:
    """
    What a source holds.

    Args:
        name: of the source.
        formats: number of records by format.
        bad: reasons of the bad records, by name.
        lengths: tokens of each sample.
        learnt: tokens of each sample that count in the loss.
        images: images and frames of each sample.
        bytes: memory of each sample.
        is_part: whether there are more records than were read.
    """

    name: str
    formats: Counter = field(default_factory=Counter)
    bad: dict[str, str] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    is_part: bool = False


def check_source(source: Source, processor: NeoProcessor | None, limit: int | None = None) -> SourceReport:
    """
    Encode the records of a source once, in order.

    Args:
        source, processor: see `SampleStream`.
        limit: read only so many records.
    """
    report = SourceReport(source.name)
    handles = iter(source.shards)
    total = len(source.shards) if hasattr(source.shards, "__len__") else None
    total = total if limit is None else min(limit, total or limit)
    for handle in tqdm(islice(handles, limit), desc=source.name, total=total, unit=" records"):
        for name, sample in source.encode(handle, processor):
            if isinstance(sample, Exception):
                report.bad[name] = str(sample)
                continue
            report.lengths.append(len(sample["input_ids"]))
            report.learnt.append(int((sample["labels"] != IGNORE_INDEX).sum()))
            report.images.append(len(sample.get("image_grid_hw", ())))
            report.bytes.append(count_bytes(sample))
        report.formats[_format(handle[1], source.columns)] += 1
    report.is_part = next(handles, None) is not None
    return report


def _format(look_up: Callable, columns: dict[str, str]) -> str:
    """The name of the format of a record as it is stored."""
    try:
        record = look_up()
    except Exception:
        return "unreadable"
    if isinstance(record, list):
        return "list of records"
    if not isinstance(record, dict):
        return "unknown"
    if "__key__" in record:
        return "WebDataset"
    return next((key for key in KEYS if record.get(columns.get(key, key)) is not None), "unknown")


@dataclass
class RowsReport:
    """
    The rows that samples are packed into.

    Args:
        num_rows: of one pass over all samples.
        fill: share of their tokens that are not padding.
        num_overlong: samples longer than a row, which are left out.
        max_bytes: memory of the largest row.
    """

    num_rows: int
    fill: float
    num_overlong: int
    max_bytes: int


def check_rows(reports: Iterable[SourceReport], max_length: int) -> RowsReport:
    """Pack the samples of some sources, by their lengths and in random order, into rows of `max_length` tokens."""
    lengths = np.array([length for report in reports for length in report.lengths])
    sizes = np.array([size for report in reports for size in report.bytes])
    order = np.random.default_rng(0).permutation(len(lengths))
    samples: list[dict] = [
        {"input_ids": range(lengths[i]), "bytes": int(sizes[i])} for i in order if lengths[i] <= max_length
    ]
    rows = list(fill_rows(samples, max_length))
    num_tokens = sum(len(sample["input_ids"]) for sample in samples)
    return RowsReport(
        num_rows=len(rows),
        fill=num_tokens / (len(rows) * max_length) if rows else 0.0,
        num_overlong=len(lengths) - len(samples),
        max_bytes=max((sum(sample["bytes"] for sample in row) for row in rows), default=0),
    )


def histogram(lengths: list[int], width: int = 40) -> list[str]:
    """Lines that show how many lengths there are between powers of two."""
    if not lengths:
        return []
    exponents = np.floor(np.log2(lengths)).astype(int)
    low, high = exponents.min(), exponents.max()
    counts = np.bincount(exponents - low, minlength=high - low + 1)
    return [
        f"{2**exponent:>9,} - {2 ** (exponent + 1) - 1:>9,} {count:>9,} {'#' * round(width * count / counts.max())}"
        for exponent, count in zip(range(low, high + 1), counts, strict=True)
    ]


def draw_lengths(reports: list[SourceReport], path: str | Path, max_length: int | None = None):
    """
    Draw the lengths of the samples of each source as a histogram.

    Args:
        path: of the image; its suffix is the format.
        max_length: tokens of a row, to be marked.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    longest = max(max(report.lengths, default=1) for report in reports)
    bins = np.geomspace(1, 2 * max(longest, max_length or 1), 60).tolist()
    axes.hist([report.lengths for report in reports], bins=bins, stacked=True, label=[r.name for r in reports])
    if max_length is not None:
        axes.axvline(max_length, color="black", linestyle="--", label=f"row of {max_length:,}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("samples")
    axes.legend()
    figure.savefig(path, dpi=150)
