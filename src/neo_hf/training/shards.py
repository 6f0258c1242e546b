"""
Records in shards: what a source is divided into, for readers to share and to shuffle.

A reader gets to any record by reading one shard up to it, and no index of records is ever built. Each class has

- `num_shards`,
- `read_shard(shard, epoch)`, which yields `(name, look_up)` for each record of a shard: its name in messages, and a
  function that returns it, or raises an error if this one record is bad,
- `__iter__`, which yields the same for all records, in the order in which they are stored.
"""

import glob
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from transformers.utils import is_datasets_available, requires_backends

if is_datasets_available():
    import datasets

Handle = tuple[str, Callable[[], Any]]

# Bytes of a JSONL file per shard: some hundred records of text.
JSONL_SHARD_BYTES = 1 << 16
# A sequence has at most this many shards. Datasets that are streamed are divided further where they have fewer files.
MAX_SHARDS = 4096
FEW_SHARDS = 256
# Records that are read together from a dataset.
READ_AHEAD = 16
# By the suffix of a file, the loader of `datasets` that reads it.
LOADERS = {".parquet": "parquet", ".tar": "webdataset"}
SUFFIXES = (".json", ".jsonl", *LOADERS)


class SequenceShards:
    """Records that can be looked up by number. A shard is every n-th of them: a sample of the whole."""

    def __init__(self, records: Sequence, name: str):
        if not len(records):
            raise ValueError(f"{name} has no records.")
        self.records = records
        self.name = name
        self.num_shards = min(len(records), MAX_SHARDS)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Handle]:
        return map(self._handle, range(len(self.records)))

    def read_shard(self, shard: int, epoch: int) -> Iterator[Handle]:
        return map(self._handle, range(shard, len(self.records), self.num_shards))

    def _handle(self, number: int) -> Handle:
        return f"{self.name}, record {number}", partial(self.records.__getitem__, number)


class JsonLines:
    """
    JSONL files, a record per line. A shard is a range of bytes, with the lines that begin in it. Empty lines are left
    out.

    Arrow, with which `datasets` reads JSON, has one type per column and refuses a file as a whole: here, records may
    differ in format, and a line that is not JSON is a bad record.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        counts = [-(-os.path.getsize(path) // JSONL_SHARD_BYTES) for path in paths]
        self.ends = list(accumulate(counts))
        self.num_shards = self.ends[-1]
        if next(iter(self), None) is None:
            raise ValueError(f"{', '.join(paths)} has no records.")

    def __iter__(self) -> Iterator[Handle]:
        for path in self.paths:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", partial(json.loads, line)

    def read_shard(self, shard: int, epoch: int) -> Iterator[Handle]:
        index = bisect_right(self.ends, shard)
        begin = (shard - (self.ends[index - 1] if index else 0)) * JSONL_SHARD_BYTES
        with open(self.paths[index], "rb") as file:
            if begin:
                # To the first line that begins here: at `begin` itself, if the byte before ends a line.
                file.seek(begin - 1)
                file.readline()
            while (offset := file.tell()) < begin + JSONL_SHARD_BYTES and (line := file.readline()):
                if line.strip():
                    yield f"{self.paths[index]}, byte {offset}", partial(json.loads, line)


class StreamedShards:
    """A streamed dataset with its own shards: files, or row groups where there are few files."""

    def __init__(self, dataset: "datasets.IterableDataset", name: str):
        # Decoding a broken image would end the stream.
        self.dataset = dataset if dataset.features is None else dataset.decode(False)
        if self.dataset.num_shards < FEW_SHARDS:
            self.dataset = self.dataset.reshard()
        self.name = name
        self.num_shards = self.dataset.num_shards

    def __iter__(self) -> Iterator[Handle]:
        return self._handles(self.dataset, self.name)

    def read_shard(self, shard: int, epoch: int) -> Iterator[Handle]:
        dataset = self.dataset.shard(self.num_shards, shard)
        dataset.set_epoch(epoch)
        return self._handles(dataset, f"{self.name}, shard {shard}")

    @staticmethod
    def _handles(dataset: "datasets.IterableDataset", name: str) -> Iterator[Handle]:
        number = 0
        # In a worker of a DataLoader, the iterator of the dataset itself would read only a share.
        for batch in dataset.iter(READ_AHEAD):
            for values in zip(*batch.values(), strict=True):
                record = dict(zip(batch, values, strict=True))
                yield f"{name}, record {number}", partial(_identity, record)
                number += 1


class IterableShards:
    """Any other iterable, as one shard."""

    num_shards = 1

    def __init__(self, records: Iterable, name: str):
        self.records = records
        self.name = name

    def __iter__(self) -> Iterator[Handle]:
        for number, record in enumerate(self.records):
            yield f"{self.name}, record {number}", partial(_identity, record)

    def read_shard(self, shard: int, epoch: int) -> Iterator[Handle]:
        return iter(self)


def _identity(record):
    return record


def open_records(data: Any, name: str):
    """The shards of what a `Source` takes as `data`; see there for the errors."""
    if isinstance(data, (str, os.PathLike)):
        return _open_path(os.fspath(data), name)
    if is_datasets_available() and isinstance(data, datasets.IterableDataset):
        return StreamedShards(data, name)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if is_datasets_available() and isinstance(data, datasets.Dataset):
            data = data.with_format(None)
        return SequenceShards(data, name)
    if not isinstance(data, Iterable) or iter(data) is data:
        raise ValueError(f"data must be a file or an iterable that can be iterated repeatedly, got {data!r:.200}.")
    return IterableShards(data, name)


def _open_path(path: str, name: str):
    files = _find_files(path)
    if files is None:
        requires_backends(open_records, ["datasets"])
        return StreamedShards(datasets.load_dataset(path, split="train", streaming=True), name)
    suffixes = sorted({os.path.splitext(file)[1].lower() for file in files})
    if len(suffixes) > 1:
        raise ValueError(
            f"{path} has files of several formats, {', '.join(suffixes)}: give each as a glob, *{suffixes[0]}."
        )
    [suffix] = suffixes
    if suffix == ".jsonl":
        return JsonLines(files)
    if suffix == ".json":
        return SequenceShards([record for file in files for record in _read_json(file)], name)
    requires_backends(open_records, ["datasets"])
    loader = LOADERS[suffix]
    try:
        dataset = datasets.load_dataset(loader, data_files=files, split="train", streaming=True)
    except Exception as error:  # of Arrow, tarfile, ...
        raise ValueError(f"{path} cannot be read as {loader}: {error}") from error
    return StreamedShards(dataset, name)


def _find_files(path: str) -> list[str] | None:
    """The data files of a file, folder or glob; `None` for a Hub id."""
    is_pattern = glob.has_magic(path) and not os.path.exists(path)
    if os.path.isdir(path) or is_pattern:
        found = glob.glob(path if is_pattern else os.path.join(glob.escape(path), "**"), recursive=True)
        files = sorted(file for file in found if file.lower().endswith(SUFFIXES) and os.path.isfile(file))
        if not files:
            raise FileNotFoundError(f"There are no data files ({', '.join(SUFFIXES)}) in {path}.")
        return files
    if path.lower().endswith(SUFFIXES) or os.path.isfile(path):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no data file {path}.")
        if not path.lower().endswith(SUFFIXES):
            raise ValueError(f"A data file must be one of {', '.join(SUFFIXES)}, got {path}.")
        return [path]
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return None
    raise FileNotFoundError(f"There is no data file or folder {path}.")


def _read_json(path: str) -> list:
    with open(path, encoding="utf-8") as file:
        try:
            records = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}. With one record per line, name it .jsonl.") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must contain a list of records, got {records!r:.200}.")
    return records
