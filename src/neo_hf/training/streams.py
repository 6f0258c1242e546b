"""Endless streams of samples from weighted sources, and the loader that saves where they are."""

import io
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.sources import Source, SourceReader

WEIGHTINGS = ("samples", "tokens")


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
    has each record once: do not shard the stream again. What a reader yields depends only on the seed, on its number
    and on how many there are. It continues after a `state_dict` that it is given; `StreamLoader` and `NeoTrainer` see
    to that.

    Bad records are skipped and logged with the reason.

    Args:
        sources: with their weights.
        processor: encodes the records; `None` if all of them are samples already.
        seed: of the draw and of the order within each source.
        weighting: what the weights count. "samples": each sample is drawn from a source with a probability
            proportional to its weight. "tokens": the next sample is from the source that lags behind most, so that the
            tokens of the sources are in the proportion of their weights.
        normalize: whether patches are normalised, float32. Otherwise they are uint8, a quarter of the size, as
            `NeoTrainer` takes them; see `normalize_patches`.

    Raises:
        ValueError: there are no sources, or `weighting` is unknown; during iteration, a source has no good record.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        processor: NeoProcessor | None,
        seed: int = 0,
        weighting: str = "samples",
        normalize: bool = False,
    ):
        self.sources = list(sources)
        if not self.sources:
            raise ValueError("A stream needs at least one source, got none.")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
        self.processor = processor
        self.seed = seed
        self.weighting = weighting
        self.normalize = normalize
        self._skipped = shared_counter()
        self._start: dict | None = None
        self._state: dict | None = None

    @property
    def num_skipped(self) -> int:
        """How many bad records were skipped by this process and its workers."""
        return self._skipped.value

    def _skip(self, name: str):
        with self._skipped.get_lock():
            self._skipped.value += 1

    def initial_state(self, reader: int, num_readers: int) -> dict:
        """The state of a reader that has not begun."""
        names = [source.name for source in self.sources]
        return {
            "reader": [reader, num_readers],
            "samples": 0,
            "tokens": [0] * len(names),
            "sources": names,
            "readers": [None] * len(names),
        }

    def state_dict(self) -> dict:
        """Where this reader is after the sample that it yielded last: plain numbers and strings."""
        state = self._state or self._start or self.initial_state(*this_reader())
        return {**state, "tokens": [*state["tokens"]], "readers": [one and {**one} for one in state["readers"]]}

    def load_state_dict(self, state: dict):
        """
        The next iteration continues after this state.

        Raises:
            ValueError: the state is of other sources.
        """
        if state["sources"] != (names := [source.name for source in self.sources]):
            raise ValueError(f"The saved state is of the sources {state['sources']}, the stream has {names}.")
        self._start, self._state = state, None

    def __iter__(self) -> Iterator[dict]:
        state = self._start or self.initial_state(*this_reader())
        self._state = state = {**state, "tokens": [*state["tokens"]], "readers": [*state["readers"]]}
        reader, num_readers = state["reader"]
        readers = [
            SourceReader(source, self.processor, reader, num_readers, self.seed, self.normalize, self._skip)
            for source in self.sources
        ]
        for one, saved in zip(readers, state["readers"], strict=True):
            one.state = {**saved} if saved else one.state
        samples = [iter(one) for one in readers]
        weights = [source.weight for source in self.sources]
        while True:
            if self.weighting == "samples":
                draw = random.Random(f"{self.seed} {reader} {state['samples']}")
                [index] = draw.choices(range(len(readers)), weights)
            else:
                index = min(range(len(readers)), key=lambda index: state["tokens"][index] / weights[index])
            sample = next(samples[index])
            state["samples"] += 1
            state["tokens"][index] += len(sample["input_ids"])
            state["readers"][index] = readers[index].state
            yield sample | {"source": index}


@dataclass
class _State:
    """The state of a worker after a batch. As an object of its own class, it is not copied to pinned memory."""

    worker: int
    data: torch.Tensor


@dataclass
class _CollateWithState:
    """Collates in the process that reads, and adds where that reader is then."""

    collate_fn: Callable[[list], dict]
    dataset: Any

    def __call__(self, items: list) -> tuple[dict, _State]:
        worker = get_worker_info()
        dataset: Any = worker.dataset if worker else self.dataset
        state = dataset.state_dict()
        return self.collate_fn(items), _State(worker.id if worker else 0, _to_bytes(state))


@dataclass
class _LoadState:
    """Sets a worker where the one of an earlier loader was, whose turn it is."""

    states: list[torch.Tensor]

    def __call__(self, worker: int):
        info: Any = get_worker_info()
        info.dataset.load_state_dict(_from_bytes(self.states[worker]))


class StreamLoader(DataLoader):
    """
    A `DataLoader` for a `SampleStream`, or a `PackedDataset` of one, that can be saved and continued. The batches
    after `load_state_dict` are those that would have followed `state_dict`, equal to the bit, and none of the records
    before it is encoded again. The state of a worker, with the samples that wait to be packed, comes along with each
    of its batches, so that batches prepared ahead do not count.

    Args:
        dataset: the stream or its rows.
        rank, world_size: of this process, of those that share the data.
        kwargs: of `DataLoader`.
    """

    dataset: Any

    def __init__(self, dataset, collate_fn: Callable[[list], dict], rank: int = 0, world_size: int = 1, **kwargs):
        super().__init__(
            dataset,
            collate_fn=_CollateWithState(collate_fn, dataset),
            # Of the workers' seeds, which nothing here uses: the global generator is left as it is.
            generator=torch.Generator().manual_seed(0),
            **kwargs,
        )
        num_readers = max(self.num_workers, 1)
        self._states = [
            _to_bytes(dataset.initial_state(rank * num_readers + worker, world_size * num_readers))
            for worker in range(num_readers)
        ]
        self._num_batches = 0

    def state_dict(self) -> dict:
        """Where the loader is after the batch that it yielded last: for `torch.save`."""
        return {"num_batches": self._num_batches, "workers": list(self._states)}

    def load_state_dict(self, state: dict):
        """
        The next iteration continues after this state.

        Raises:
            ValueError: it is of another number of workers or processes, or of other sources.
        """
        readers, saved = (
            [_from_bytes(one)["reader"] for one in states] for states in (self._states, state["workers"])
        )
        if readers != saved:
            raise ValueError(
                f"The saved state is of the readers {saved} (number, of how many), one per worker of this process; "
                f"this loader has {readers}. Resume with as many processes and dataloader_num_workers as before."
            )
        self.dataset.load_state_dict(_from_bytes(state["workers"][0]))
        self._num_batches, self._states = state["num_batches"], list(state["workers"])

    def __iter__(self):
        # A DataLoader begins with its first worker: that is now the one whose turn it is.
        count = len(self._states)
        turn = self._num_batches % count
        order = [(turn + worker) % count for worker in range(count)]
        load = _LoadState([self._states[worker] for worker in order])
        if self.num_workers:
            self.worker_init_fn = load
        else:
            self.dataset.load_state_dict(_from_bytes(self._states[0]))
        for batch, state in super().__iter__():
            self._states[order[state.worker]] = state.data
            self._num_batches += 1
            yield batch


def _to_bytes(state: dict) -> torch.Tensor:
    """As one tensor, which passes through shared memory, where hundreds of small ones would each need a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _from_bytes(state: torch.Tensor) -> dict:
    return torch.load(io.BytesIO(state.numpy().tobytes()), weights_only=True)
