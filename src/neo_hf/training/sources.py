"""Where records come from, and the endless share of them that a reader takes."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.records import prepare_records
from neo_hf.training.samples import encode_record
from neo_hf.training.shards import Handle, open_records

logger = logging.getLogger(__name__)

# After this many bad records in a row, or this many passes without a good one, the source itself is considered bad.
MAX_BAD_RECORDS = 1000
MAX_BARREN_PASSES = 100


@dataclass
class Source:
    """
    A set of records with its options.

    Args:
        data: a file (`.jsonl`, `.json` with a list, `.parquet`, `.tar` in WebDataset format), a folder or glob of such
            files of one format, the Hub id of a dataset (its split `train`, streamed), or the records themselves: a
            list, a `datasets.Dataset` or `datasets.IterableDataset`, or any other iterable that can be iterated
            repeatedly.
        root: folder that relative paths of images and videos start from.
        weight: share of this source in a stream, relative to the weights of the others.
        name: for messages; defaults to the path, or to the type of `data`.
        columns: names of `records.py` (`image`, `caption`, `messages`, ...), and those that the records have in their
            place.
        shuffle_buffer: in each pass, shards are shuffled, and so many records of them, which are held in memory
            undecoded. 1 keeps the order in which records are stored.
        images_kwargs, videos_kwargs: options of the processor for this source: pixel budgets, sampling and style of
            videos.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: the file is of no such format, there are no records, or an option is out of range.
    """

    data: Any
    root: str | os.PathLike | None = None
    weight: float = 1.0
    name: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    shuffle_buffer: int = 1000
    images_kwargs: dict = field(default_factory=dict)
    videos_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight}.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}.")
        if self.root is not None and not os.path.isdir(self.root):
            raise FileNotFoundError(f"root must be a folder, got {self.root}.")
        is_path = isinstance(self.data, (str, os.PathLike))
        self.name = self.name or (str(self.data) if is_path else type(self.data).__name__)
        self.shards = open_records(self.data, self.name)

    def encode(
        self, handle: Handle, processor: NeoProcessor | None, normalize: bool = False, start: int = 0
    ) -> Iterator[tuple[str, dict | Exception]]:
        """
        The samples of what is stored under `handle`, one or, where it packs several conversations, those from number
        `start` on. Each comes with its name; of a bad record, the error takes its place.
        """
        name, look_up = handle
        try:
            records = prepare_records(look_up(), self.columns)
        except Exception as error:  # a record can be bad in any way
            yield name, error
            return
        for number, record in enumerate(records[start:], start=start + 1):
            part = f"{name}, part {number}" if len(records) > 1 else name
            try:
                yield (
                    part,
                    encode_record(
                        record,
                        processor,
                        self.root,
                        part,
                        self.images_kwargs,
                        self.videos_kwargs,
                        normalize=normalize,
                    ),
                )
            except Exception as error:
                yield part, error


class SourceReader:
    """
    The samples of one of several readers of a source, without end. Together, the readers read each record once per
    pass. Bad records are skipped and logged with the reason.

    The readers take turns with the shards, in an order that is shuffled in each pass. Of a source with fewer shards
    than readers, each reads only every n-th record of a shard. What a reader yields follows from `seed`, `state` and
    its number alone.

    Args:
        source, processor, normalize: see `SampleStream`.
        reader, num_readers: its number, from 0, and how many there are.
        seed: of the order.
        on_bad: called with the name of each bad record.

    Attributes:
        state: where the reader is, a dict of integers. A block is what is shuffled together: `shard` and `record`,
            how many shards this reader has finished and how many records of the next, say where it begins, `taken` how
            many records of the block are finished, and `part` how many conversations of the next.
    """

    def __init__(
        self,
        source: Source,
        processor: NeoProcessor | None,
        reader: int = 0,
        num_readers: int = 1,
        seed: int = 0,
        normalize: bool = False,
        on_bad: Callable[[str], None] = lambda name: None,
    ):
        self.source = source
        self.processor = processor
        self.reader = reader
        self.num_readers = num_readers
        self.seed = seed
        self.normalize = normalize
        self.on_bad = on_bad
        self.state = {"shard": 0, "record": 0, "taken": 0, "part": 0}
        # Of each shard. Those of a sequence are not divided: they are small, and a part would be empty.
        is_sequence = hasattr(source.shards, "__len__")
        self.num_parts = 1 if is_sequence else -(-num_readers // source.shards.num_shards)
        # Where each record is a shard, the order of shards is that of all records, whatever the number of readers.
        is_shuffled = is_sequence and len(source.shards) == source.shards.num_shards
        self.block_size = 1 if is_shuffled else source.shuffle_buffer

    def _turn(self, shard: int) -> tuple[int, int]:
        """The pass in which the reader has its turn number `shard`, and the place in the order of that pass."""
        return divmod(self.reader + shard * self.num_readers, self.source.shards.num_shards * self.num_parts)

    def _read_pass(self) -> Iterator[tuple[int, int, Handle]]:
        """The records from `state` to the end of the pass, each with the value of `shard` and `record` after it."""
        shard, skipped = self.state["shard"], self.state["record"]
        epoch, place = self._turn(shard)
        count = self.source.shards.num_shards * self.num_parts
        order = np.arange(count)
        if self.source.shuffle_buffer > 1:
            order = np.random.default_rng((self.seed, epoch)).permutation(count)
        while place < count:
            number, part = divmod(int(order[place]), self.num_parts)
            handles = islice(self.source.shards.read_shard(number, epoch), part, None, self.num_parts)
            for record, handle in enumerate(islice(handles, skipped, None), start=skipped + 1):
                yield shard, record, handle
            shard, skipped, place = shard + 1, 0, place + self.num_readers

    def _next_pass(self) -> int:
        """The number of the first turn in the next pass."""
        epoch, _ = self._turn(self.state["shard"])
        begin = (epoch + 1) * self.source.shards.num_shards * self.num_parts
        return max(0, -((self.reader - begin) // self.num_readers))

    def handles(self) -> Iterator[Handle | None]:
        """Each record in turn, and `None` after each pass. `state` counts a record when the next one is taken."""
        while True:
            records = self._read_pass()
            while block := list(islice(records, self.block_size)):
                key = (self.seed, self.reader, self.state["shard"], self.state["record"])
                order = np.random.default_rng(key).permutation(len(block))
                for index in order[self.state["taken"] :]:
                    yield block[index][2]
                    self.state["taken"] += 1
                shard, record, _ = block[-1]
                self.state = {"shard": shard, "record": record, "taken": 0, "part": 0}
            self.state = {"shard": self._next_pass(), "record": 0, "taken": 0, "part": 0}
            yield None

    def __iter__(self) -> Iterator[dict]:
        """
        Raises:
            ValueError: there are no records, or no good one among the last 1000 or in the last 100 passes.
        """
        found, barren, bad = False, 0, dict[str, Exception]()  # bad ones since the last good one
        for handle in self.handles():
            if handle is None:
                barren += 1
                if barren < MAX_BARREN_PASSES:
                    continue
                if not bad:
                    raise ValueError(
                        f"{self.source.name} has no records for reader {self.reader + 1} of {self.num_readers}."
                    )
                break
            for name, sample in self.source.encode(handle, self.processor, self.normalize, self.state["part"]):
                self.state["part"] += 1
                if isinstance(sample, Exception):
                    if name not in bad:
                        logger.warning("Skipped %s: %s", name, sample)
                    bad[name] = sample
                    self.on_bad(name)
                    continue
                found, barren = True, 0
                bad.clear()
                yield sample
            self.state["part"] = 0
            if len(bad) >= MAX_BAD_RECORDS:
                break
        raise_bad_source(self.source, bad, found)


def raise_bad_source(source: Source, bad: dict[str, Exception], found: bool):
    """
    Args:
        bad: the reasons why the last records are bad, by name.
        found: whether there was a good record before them.
    """
    which = f"the last {len(bad)} records" if found else f"all of the {len(bad)} records read"
    error = list(bad.values())[-1]
    raise ValueError(f"{source.name}: {which} are bad, the last one: {error}") from error


def load_samples(sources: Iterable[Source], processor: NeoProcessor | None, normalize: bool = False) -> list[dict]:
    """
    All samples of some sources, in order and in memory: for evaluation and small datasets. Bad records are skipped and
    logged with the reason.

    Args:
        sources, processor, normalize: see `SampleStream`.

    Raises:
        ValueError: a source has no good record.
    """
    samples: list[dict] = []
    for source in sources:
        bad: dict[str, Exception] = {}
        count = len(samples)
        total = len(source.shards) if hasattr(source.shards, "__len__") else None
        for handle in tqdm(source.shards, desc=f"Encoding {source.name}", total=total, delay=3):
            for name, sample in source.encode(handle, processor, normalize):
                if isinstance(sample, Exception):
                    logger.warning("Skipped %s: %s", name, sample)
                    bad[name] = sample
                else:
                    samples.append(sample)
        if len(samples) == count:
            if not bad:
                raise ValueError(f"{source.name} has no records.")
            raise_bad_source(source, bad, found=False)
        if bad:
            logger.warning("%s: skipped %d bad records.", source.name, len(bad))
    return samples
