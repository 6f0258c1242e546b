"""Packing: documents of different lengths into rows of the same length."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import IterableDataset

from neo_hf.training.sources import MAX_BAD_RECORDS
from neo_hf.training.streams import SampleStream, shared_counter, this_reader

logger = logging.getLogger(__name__)

# Of samples that wait to be packed: some 20 images of 1,024 x 1,024 pixels, as uint8.
BUFFER_BYTES = 64 << 20


def fill_rows(
    samples: Iterable[dict],
    max_length: int,
    buffer_size: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    buffer: list[dict] | None = None,
) -> Iterator[list[dict]]:
    """
    Pack samples into rows (lists) of at most `max_length` tokens, each sample once. A row starts with the oldest
    sample in the buffer, so that none waits long, and is filled with whichever leaves the least room (best fit; of
    equal lengths, the oldest). A sample longer than a row gets a row of its own, which `PackedCollator` rejects.

    Args:
        samples: to pack.
        max_length: tokens per row.
        buffer_size, buffer_bytes: no more samples are read ahead than the former, or than it takes to fill the latter.
        buffer: holds the samples that have been read and not yet used, from earlier rows to begin with.
    """
    samples = iter(samples)
    buffer = [] if buffer is None else buffer
    num_bytes = sum(map(count_bytes, buffer))
    while True:
        while len(buffer) < buffer_size and (num_bytes < buffer_bytes or not buffer):
            sample = next(samples, None)
            if sample is None:
                break
            buffer.append(sample)
            num_bytes += count_bytes(sample)
        if not buffer:
            return
        row: list[dict] = []
        room = max_length
        choice: int | None = 0
        while choice is not None:
            row.append(buffer.pop(choice))
            room -= len(row[-1]["input_ids"])
            lengths = [len(sample["input_ids"]) for sample in buffer]
            fitting = (number for number, length in enumerate(lengths) if length <= room)
            choice = max(fitting, key=lengths.__getitem__, default=None)
        num_bytes -= sum(map(count_bytes, row))
        yield row


def count_bytes(sample: dict) -> int:
    """The memory that the tensors of a sample take."""
    return sum(value.nbytes for value in sample.values() if isinstance(value, torch.Tensor))


class PackedDataset(IterableDataset):
    """
    Rows (lists) of whole samples, at most `max_length` tokens long, for `PackedCollator`. Each sample is used once.

    Args:
        samples: a `SampleStream`, or any other iterable of samples, which is read once, in order, and divided among
            processes and workers. They then have different numbers of rows: for distributed training, make it a source
            of a stream.
        max_length: tokens per row.
        buffer_size, buffer_bytes: of the samples to choose from, which each worker keeps in memory, images included:
            no more are read ahead than the former, or than it takes to fill the latter.
        drop_overlong: leave out samples longer than a row; they are logged and counted. Otherwise they raise an error.
            No sample is ever truncated.

    Raises:
        ValueError: an option is out of range; during iteration, a sample is too long and `drop_overlong` is off, or
            the first 1000 samples are all too long.
    """

    def __init__(
        self,
        samples: Iterable[dict],
        max_length: int,
        buffer_size: int = 64,
        drop_overlong: bool = True,
        buffer_bytes: int = BUFFER_BYTES,
    ):
        if max_length < 1 or buffer_size < 1:
            raise ValueError(
                f"max_length and buffer_size must be positive, got max_length={max_length}, buffer_size={buffer_size}."
            )
        self.samples = samples
        self.max_length = max_length
        self.buffer_size = buffer_size
        self.buffer_bytes = buffer_bytes
        self.drop_overlong = drop_overlong
        self._dropped = shared_counter()
        self._start: list[dict] = []
        self._buffer: list[dict] | None = None

    @property
    def num_dropped(self) -> int:
        """How many samples this process and its workers left out as too long."""
        return self._dropped.value

    def initial_state(self, reader: int, num_readers: int) -> dict:
        """The state of a reader that has not begun. This and the next two need a `SampleStream`."""
        assert isinstance(self.samples, SampleStream)
        return {**self.samples.initial_state(reader, num_readers), "buffer": []}

    def state_dict(self) -> dict:
        """That of the stream, and under `buffer` the samples that have been read and are not in a row yet."""
        assert isinstance(self.samples, SampleStream)
        return {**self.samples.state_dict(), "buffer": list(self._start if self._buffer is None else self._buffer)}

    def load_state_dict(self, state: dict):
        """The next iteration continues after this state; see `SampleStream` for the errors."""
        assert isinstance(self.samples, SampleStream)
        self.samples.load_state_dict({key: value for key, value in state.items() if key != "buffer"})
        self._start, self._buffer = state["buffer"], None

    def __iter__(self) -> Iterator[list[dict]]:
        samples = self.samples
        if not isinstance(samples, SampleStream):
            shard, num_shards = this_reader()
            samples = islice(samples, shard, None, num_shards)
        self._buffer = list(self._start)
        return fill_rows(
            self._fitting(samples), self.max_length, self.buffer_size, self.buffer_bytes, buffer=self._buffer
        )

    def _fitting(self, samples: Iterable[dict]) -> Iterator[dict]:
        num_dropped, found = 0, False
        for sample in samples:
            if (length := len(sample["input_ids"])) <= self.max_length:
                found = True
                yield sample
                continue
            message = f"{sample.get('name', 'A sample')} has {length} tokens, more than a row of {self.max_length}"
            if not self.drop_overlong:
                raise ValueError(f"{message}. Raise max_length, lower the pixel budget, or drop such samples.")
            logger.warning("Dropped: %s.", message)
            with self._dropped.get_lock():
                self._dropped.value += 1
            num_dropped += 1
            if not found and num_dropped == MAX_BAD_RECORDS:
                raise ValueError(f"The first {num_dropped} samples were all too long, the last one: {message}.")
