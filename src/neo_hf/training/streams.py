"""Endless streams of samples from weighted sources."""

import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator

from torch.utils.data import IterableDataset, get_worker_info

from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.sources import Source


def shared_counter():
    """A counter that the workers of a DataLoader, forked or spawned, can increment."""
    return multiprocessing.get_context("spawn").Value("q", 0)


def this_reader() -> tuple[int, int]:
    """
    The index of this reader and the number of readers. Each worker of a DataLoader, in each process of a distributed
    run, is a reader; launchers set RANK and WORLD_SIZE.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    worker = get_worker_info()
    if worker is None:
        return rank, world_size
    return rank * worker.num_workers + worker.id, world_size * worker.num_workers


class SampleStream(IterableDataset):
    """
    An endless stream of samples, drawn from several sources by their weights. Text-only data is a source like any
    other.

    Each process of a distributed run and each worker of a DataLoader reads its own share, so that a pass over a source
    has each record once: do not shard the stream again. The order depends only on the seed and on the numbers of
    processes and workers: to resume, skip the batches already seen.

    Bad records are skipped and logged with the reason.

    Args:
        sources: with their weights.
        processor: encodes the records; `None` if all of them are samples already.
        seed: of the draw and of the order within each source.

    Raises:
        ValueError: there are no sources; during iteration, a source has no good record.
    """

    def __init__(self, sources: Iterable[Source], processor: NeoProcessor | None, seed: int = 0):
        self.sources = list(sources)
        if not self.sources:
            raise ValueError("A stream needs at least one source, got none.")
        self.processor = processor
        self.seed = seed
        self._skipped = shared_counter()

    @property
    def num_skipped(self) -> int:
        """How many bad records were skipped by this process and its workers."""
        return self._skipped.value

    def _skip(self, name: str):
        with self._skipped.get_lock():
            self._skipped.value += 1

    def __iter__(self) -> Iterator[dict]:
        shard, num_shards = this_reader()
        draw = random.Random(f"{self.seed} {shard}")
        streams = [
            source.encode(source.draw(shard, num_shards, self.seed), self.processor, self._skip)
            for source in self.sources
        ]
        weights = [source.weight for source in self.sources]
        while True:
            [stream] = draw.choices(streams, weights)
            yield next(stream)
