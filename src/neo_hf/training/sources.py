"""Where records come from: files, lists, datasets."""

import json
import logging
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info
from tqdm import tqdm
from transformers.utils import is_datasets_available

from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.samples import encode_record

if is_datasets_available():
    import datasets
    from datasets.distributed import split_dataset_by_node

logger = logging.getLogger(__name__)

# After this many bad records in a row, the source itself is considered bad.
MAX_BAD_RECORDS = 1000


class JsonLines(Sequence):
    """
    The records of a JSONL file, read on access. Empty lines are left out.

    Raises:
        ValueError: on access, the line is not valid JSON.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.offsets, self.line_numbers = array("Q"), array("Q")
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(tqdm(file, desc=f"Indexing {path}", unit=" lines", delay=3), start=1):
                if line.strip():
                    self.offsets.append(offset)
                    self.line_numbers.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index):
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return json.loads(file.readline())


@dataclass
class Source:
    """
    A set of records with its options.

    Args:
        data: a `.json` file (a list of records), a `.jsonl` file, or the records themselves: a list, a
            `datasets.Dataset` or `datasets.IterableDataset`, or any other iterable that can be iterated repeatedly.
        root: folder that relative paths of images and videos start from.
        weight: how often a sample is drawn from this source, relative to the weights of the others.
        name: for messages; defaults to the file, or to the type of `data`.
        images_kwargs, videos_kwargs: options of the processor for this source: pixel budgets, sampling and style of
            videos.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: the file is neither a JSON list nor JSONL, there are no records, or the weight is not positive.
    """

    data: Any
    root: str | os.PathLike | None = None
    weight: float = 1.0
    name: str = ""
    images_kwargs: dict = field(default_factory=dict)
    videos_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight}.")
        if self.root is not None and not os.path.isdir(self.root):
            raise FileNotFoundError(f"root must be a folder, got {self.root}.")
        if isinstance(self.data, (str, os.PathLike)):
            self.name = self.name or str(self.data)
            self.records = read_records(self.data)
        else:
            self.name = self.name or type(self.data).__name__
            self.records = self.data
        self.is_map_style = hasattr(self.records, "__len__") and hasattr(self.records, "__getitem__")
        if not self.is_map_style and (not isinstance(self.records, Iterable) or iter(self.records) is self.records):
            raise ValueError(
                f"data must be a file or an iterable that can be iterated repeatedly, got {self.data!r:.200}."
            )
        if self.is_map_style and not len(self.records):
            raise ValueError(f"{self.name} has no records.")

    def read(self) -> Iterator[tuple[int, Any]]:
        """Each record once, in order: its number and, if it cannot be looked up by that, the record itself."""
        if self.is_map_style:
            return ((number, None) for number in range(len(self.records)))
        return enumerate(_without_decoding(self.records))

    def draw(self, shard: int, num_shards: int, seed: int) -> Iterator[tuple[int, Any]]:
        """
        The share of one of several readers, in the form of `read` but endless. Together, the readers read each record
        once per pass. Records that can be looked up by number are reshuffled in each pass; others keep their order.
        """
        if self.is_map_style:
            total = len(self.records)
            epoch = -1
            for position in count(shard, num_shards):
                if position // total != epoch:
                    epoch = position // total
                    order = np.random.default_rng((seed, epoch)).permutation(total)
                yield int(order[position % total]), None
        for epoch in count():
            is_empty = True
            for number, record in self._share(shard, num_shards, epoch):
                is_empty = False
                yield number, record
            if is_empty:
                raise ValueError(f"{self.name} has no records for reader {shard + 1} of {num_shards} (pass {epoch}).")

    def _share(self, shard: int, num_shards: int, epoch: int) -> Iterator[tuple[int, Any]]:
        if not _is_streamed(self.records):
            return islice(enumerate(self.records), shard, None, num_shards)
        # These divide themselves among the workers of a DataLoader, by whole files.
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        records = split_dataset_by_node(self.records, shard // num_workers, num_shards // num_workers)
        if records.num_shards < num_workers:
            raise ValueError(
                f"{self.name} has {records.num_shards} shards, too few for the {num_workers} workers of a DataLoader: "
                "use fewer workers, or split it (IterableDataset.reshard)."
            )
        records = _without_decoding(records)
        records.set_epoch(epoch)
        return enumerate(records)

    def encode(
        self, records: Iterable[tuple[int, Any]], processor: NeoProcessor | None, on_bad: Callable[[str], None]
    ) -> Iterator[dict]:
        """
        The samples of records from `read` or `draw`. Bad records are skipped and logged with the reason; `on_bad` is
        called with the name of each.

        Raises:
            ValueError: no record is good, or none of the last 1000.
        """
        found = False
        bad: set[int] = set()  # since the last good one
        limit = min(len(self.records), MAX_BAD_RECORDS) if self.is_map_style else MAX_BAD_RECORDS
        error: Exception | None = None
        for number, record in records:
            # Too many in a row, or a second pass over records whose order does not change.
            if len(bad) >= limit or (number in bad and not self.is_map_style):
                break
            name = f"{self.name}, record {number}"
            if isinstance(self.records, JsonLines):
                name = f"{self.name}:{self.records.line_numbers[number]}"
            try:
                record = self.records[number] if self.is_map_style else record
                sample = encode_record(record, processor, self.root, name, self.images_kwargs, self.videos_kwargs)
            except Exception as reason:  # a record can be bad in any way
                logger.warning("Skipped %s: %s", name, reason)
                on_bad(name)
                error = reason
                bad.add(number)
                continue
            found = True
            bad.clear()
            yield sample
        else:
            if found:
                return
        which = f"the last {len(bad)} records" if found else f"all of the {len(bad)} records read"
        raise ValueError(f"{self.name}: {which} are bad, the last one: {error}") from error


def load_samples(sources: Iterable[Source], processor: NeoProcessor | None) -> list[dict]:
    """
    All samples of some sources, in order and in memory: for evaluation and small datasets. Bad records are skipped and
    logged with the reason.

    Raises:
        ValueError: a source has no good record.
    """
    samples: list[dict] = []
    for source in sources:
        bad: list[str] = []
        total = len(source.records) if source.is_map_style else None
        records = tqdm(source.read(), desc=f"Encoding {source.name}", total=total, delay=3)
        samples += source.encode(records, processor, bad.append)
        if bad:
            logger.warning("%s: skipped %d bad records.", source.name, len(bad))
    return samples


def read_records(path: str | os.PathLike) -> Sequence:
    """The records of a `.json` or `.jsonl` file; see `Source` for the errors."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no data file {path}.")
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".jsonl":
        return JsonLines(path)
    if suffix != ".json":
        raise ValueError(
            f"A data file must be .json or .jsonl, got {path}. Pass other formats as a `datasets` dataset."
        )
    with open(path, encoding="utf-8") as file:
        try:
            records = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}. With one record per line, name it .jsonl.") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must contain a list of records, got {records!r:.200}.")
    return records


def _is_streamed(records) -> bool:
    return is_datasets_available() and isinstance(records, datasets.IterableDataset)


def _without_decoding(records):
    """A streamed dataset that leaves its images encoded: decoding a broken one would end the stream."""
    return records.decode(False) if _is_streamed(records) and records.features is not None else records
