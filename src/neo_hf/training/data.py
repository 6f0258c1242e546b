"""
Data for training: chats with images and videos, from files or datasets, to samples.

A *record* is one conversation as it is stored, in one of the formats of `encode_record`. A *sample* is what a model
learns from, a dict of

- `input_ids` (L,) int64 and `labels` (L,) int64, -100 where nothing is learnt,
- `pixel_values` (P, 3 * patch_size^2) float32 and `image_grid_hw` (N, 2) int64 where there are images or frames,
- `name`: where it comes from, for error messages.
"""

import base64
import json
import logging
import math
import multiprocessing
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm
from transformers.utils import is_datasets_available
from transformers.utils.chat_template_utils import render_jinja_template

from neo_hf.image_processing_neo import shared_budget
from neo_hf.processing_neo import NeoProcessor

if is_datasets_available():
    import datasets
    from datasets.distributed import split_dataset_by_node

logger = logging.getLogger(__name__)

IGNORED = -100
# The conversation's key, and those of a turn's role and content.
FORMATS = (("messages", "role", "content"), ("conversations", "from", "value"))
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
PART_TYPES = ("text", "image", "image_url", "video")
# Where a part of a message holds its image or video, and where those beside the conversation stand.
PART_KEYS = {"image": ("image", "image_url", "path", "url"), "video": ("video", "path", "url")}
COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}
# A source of which so many records in a row were bad is taken to be bad as a whole.
MAX_BAD_RECORDS = 1000


class JsonLines(Sequence):
    """
    The records of a JSONL file, read one by one when asked for; empty lines are left out.

    Raises:
        ValueError: on access, a line is no JSON.
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
    Records from one place.

    Args:
        data: a `.json` (a list of records) or `.jsonl` file; or records: a list, a `datasets.Dataset` or
            `datasets.IterableDataset`, or any other iterable that can be read again and again.
        root: the folder of relative paths of images and videos.
        weight: how often a sample is drawn from here, in proportion to the weights of the other sources.
        name: for messages; by default the file, or the kind of `data`.
        images_kwargs, videos_kwargs: settings of the processor for these images and videos: pixel budgets, sampling
            and style of videos.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is no JSON list or JSONL, there are no records, or the weight is not positive.
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
                f"data must be a file or an iterable that can be read again and again, got {self.data!r:.200}."
            )
        if self.is_map_style and not len(self.records):
            raise ValueError(f"{self.name} holds no records.")

    def record_name(self, number: int) -> str:
        if isinstance(self.records, JsonLines):
            return f"{self.name}:{self.records.line_numbers[number]}"
        return f"{self.name}, record {number}"

    def read(self) -> Iterator[tuple[int, Any]]:
        """Each record once, in order: its number and, where it cannot be asked for by that, the record."""
        if self.is_map_style:
            return ((number, None) for number in range(len(self.records)))
        return enumerate(without_decoding(self.records))

    def draw(self, shard: int, num_shards: int, seed: int) -> Iterator[tuple[int, Any]]:
        """
        The share of one of several readers, as of `read` but without end: records that can be asked for by number,
        shuffled anew in each pass; others in their order. Together the readers read each record once per pass.
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
                raise ValueError(
                    f"{self.name} holds no records for reader {shard + 1} of {num_shards} (pass {epoch})."
                )

    def fetch(self, number: int, record) -> Any:
        """The record of a pair from `read` or `draw`; raises what is wrong with it where it cannot be read."""
        return self.records[number] if self.is_map_style else record

    def _share(self, shard: int, num_shards: int, epoch: int) -> Iterator[tuple[int, Any]]:
        if not is_streamed(self.records):
            return islice(enumerate(self.records), shard, None, num_shards)
        # Those share themselves out among the workers of a DataLoader, by whole files.
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        records = split_dataset_by_node(self.records, shard // num_workers, num_shards // num_workers)
        if records.num_shards < num_workers:
            raise ValueError(
                f"{self.name} has {records.num_shards} shards, too few for the {num_workers} workers of a DataLoader: "
                "use fewer workers, or split it (IterableDataset.reshard)."
            )
        records = without_decoding(records)
        records.set_epoch(epoch)
        return enumerate(records)


def is_streamed(records) -> bool:
    return is_datasets_available() and isinstance(records, datasets.IterableDataset)


def without_decoding(records):
    """A streamed dataset that leaves its images encoded: one that is broken would end the stream."""
    return records.decode(False) if is_streamed(records) and records.features is not None else records


def read_records(path: str | os.PathLike) -> Sequence:
    """The records of a `.json` or `.jsonl` file; see `Source` for the errors raised."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no data file {path}.")
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".jsonl":
        return JsonLines(path)
    if suffix != ".json":
        raise ValueError(f"A data file must be .json or .jsonl, got {path}. Give other data as a `datasets` dataset.")
    with open(path, encoding="utf-8") as file:
        try:
            records = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}. One record per line would be .jsonl.") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records, got {records!r:.200}.")
    return records


def encode_record(
    record: dict,
    processor: NeoProcessor | None,
    root: str | os.PathLike | None = None,
    name: str = "",
    images_kwargs: dict | None = None,
    videos_kwargs: dict | None = None,
) -> dict:
    """
    A record as a sample. What is learnt is what the chat template's generation markers enclose: the assistant's words
    with `<|im_end|>\\n`, of every turn. n > 1 images share the pixel budget as in the released training,
    `max(2 * max_pixels // n, min_pixels)` each, unless `images_kwargs` say `share_pixel_budget=False`.

    Args:
        record: of one of these formats, told by its keys.
            `messages`: OpenAI's and TRL's, `{"role", "content"}` with role system, user or assistant. The content is
            text or a list of parts: `{"type": "text", "text"}`; `{"type": "image"}` with the image as `image`,
            `path`, `url` or `base64`; `{"type": "image_url", "image_url": {"url"}}`; `{"type": "video"}` with `video`,
            `path` or `url`.
            `conversations`: the released trainer's, `{"from": "human", "gpt" or "system", "value": text}`.
            `input_ids` and `labels`: a sample already.
            Beside either conversation, images can stand in `image` or `images`, videos in `video` or `videos`: each
            `<image>` (`<video>`) in the text, and each part without an image of its own, takes the next one. Where
            `messages` have no place for any of them, they come first in the first user's turn, as TRL has it.
        root: the folder of relative paths.
        name: of the sample.
        images_kwargs, videos_kwargs: settings for the processor.

    Raises:
        ValueError: the record has none of the formats, images and their places differ in number, there is no turn
            of the assistant, or an image or video cannot be read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"A record must be a dict, got {record!r:.200}.")
    if record.get("input_ids") is not None:
        return _encoded(record, processor, name)
    if processor is None:
        raise ValueError("A conversation needs a processor to become a sample, got None.")
    messages, media = _read_conversation(record, root)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("The conversation has no assistant turn: there is nothing to learn.")

    rendered: Any = render_jinja_template(
        [messages],
        chat_template=processor.chat_template,  # type: ignore[arg-type]
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    [text], [spans] = rendered
    if not spans:
        raise ValueError("The chat template marks nothing to learn: it has no {% generation %} around the answers.")
    # Headers and answers are tokenised apart, as in the released training, and as an answer that is generated follows
    # its header: in one string, an answer that begins with a newline would share a token with its header.
    cuts = [0, *chain.from_iterable(spans), len(text)]
    segments = [text[start:end] for start, end in pairwise(cuts)]  # every second one is learnt
    images_kwargs = {**(images_kwargs or {})}
    if images_kwargs.pop("share_pixel_budget", True):
        limits = {key: getattr(processor.image_processor, key) for key in ("max_pixels", "min_pixels")}
        limits |= {key: value for key, value in images_kwargs.items() if key in limits}
        images_kwargs["max_pixels"] = shared_budget(**limits, count=len(media["image"]))
    kwargs: dict = {
        "images_kwargs": {**images_kwargs, "share_pixel_budget": False},  # it would be shared within a segment
        "videos_kwargs": videos_kwargs or {},
        "text_kwargs": {"padding": False, "add_special_tokens": False},
    }
    inputs = processor(
        text=segments,
        images=_split(media["image"], [segment.count(processor.image_token) for segment in segments]),
        videos=_split(media["video"], [segment.count(processor.video_token) for segment in segments]),
        **kwargs,
    )
    ids = [torch.tensor(segment, dtype=torch.long) for segment in inputs["input_ids"]]
    labels = [segment if number % 2 else torch.full_like(segment, IGNORED) for number, segment in enumerate(ids)]
    input_ids = torch.cat(ids)
    is_image = input_ids == processor.image_token_id
    sample = {"input_ids": input_ids, "labels": torch.cat(labels).masked_fill(is_image, IGNORED)}
    images = {key: torch.from_numpy(inputs[key]) for key in ("pixel_values", "image_grid_hw") if key in inputs}
    num_patches = len(images["pixel_values"]) if images else 0
    if int(is_image.sum()) * processor.image_processor.spatial_merge_size**2 != num_patches:
        raise ValueError(f"The text holds {processor.image_context_token}, which only images may bring.")
    return {**sample, **images, "name": name}


def _encoded(record: dict, processor: NeoProcessor | None, name: str) -> dict:
    """A record that is a sample already, with the right types."""
    dtypes = {"input_ids": torch.long, "labels": torch.long, "image_grid_hw": torch.long, "pixel_values": torch.float}
    sample = {
        key: torch.as_tensor(record[key], dtype=dtype) for key, dtype in dtypes.items() if record.get(key) is not None
    }
    if "labels" not in sample or sample["input_ids"].ndim != 1 or sample["labels"].shape != sample["input_ids"].shape:
        shapes = {key: tuple(value.shape) for key, value in sample.items()}
        raise ValueError(f"A sample needs input_ids (L,) and labels (L,), got {shapes}.")
    if processor is not None:
        is_image = sample["input_ids"] == processor.image_token_id
        sample["labels"] = sample["labels"].masked_fill(is_image, IGNORED)
        num_patches = int(is_image.sum()) * processor.image_processor.spatial_merge_size**2
        if num_patches != len(sample.get("pixel_values", ())):
            raise ValueError(
                f"A sample needs the patches of its images: its image tokens stand for {num_patches}, pixel_values "
                f"holds {len(sample.get('pixel_values', ()))}."
            )
    if not (sample["labels"][1:] != IGNORED).any():
        raise ValueError("The sample has no labels but ignored ones: there is nothing to learn.")
    return sample | {"name": record.get("name") or name}


def _read_conversation(record: dict, root: str | os.PathLike | None) -> tuple[list[dict], dict[str, list]]:
    """
    The messages of a record as the chat template takes them, and its images and videos in the order of their places.
    """
    keys = next((keys for keys in FORMATS if record.get(keys[0]) is not None), None)
    if keys is None:
        known = ", ".join(keys[0] for keys in FORMATS)
        raise ValueError(f"A record must have one of {known}, input_ids; it has {sorted(map(str, record))}.")
    conversation, role_key, content_key = keys
    messages: list[dict] = []
    for turn in record[conversation]:
        role = ROLES.get(str(turn.get(role_key))) if isinstance(turn, dict) else None
        if role is None:
            raise ValueError(f"A turn must have a `{role_key}`, one of {', '.join(ROLES)}, got {turn!r:.200}.")
        content = turn.get(content_key) or ""
        if not isinstance(content, (str, list)):
            raise ValueError(f"`{content_key}` must be text or a list of parts, got {content!r:.200}.")
        messages.append({"role": role, "content": _text(content) if isinstance(content, str) else list(content)})

    media = {}
    for kind, columns in COLUMNS.items():
        column = list(chain.from_iterable(_as_list(record.get(name)) for name in columns))
        places = [place for message in messages for part in message["content"] for place in _places(part, kind)]
        if column and not places and conversation == "messages":
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is not None:
                places = [None] * len(column)
                first["content"] = [{"type": kind}] * len(column) + first["content"]
        if (num_places := sum(place is None for place in places)) != len(column):
            raise ValueError(
                f"{len(column)} {kind}s are given beside the conversation, but it has {num_places} places for them "
                f"(<{kind}> in its text, or parts of type {kind} that hold none)."
            )
        following = iter(column)
        media[kind] = [_locate(next(following) if place is None else place, root) for place in places]
    for message in messages:
        message["content"] = [part if part["type"] == "text" else {"type": _kind(part)} for part in message["content"]]
    return messages, media


def _text(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


def _as_list(value) -> list:
    if value is None or value == "":  # as some write text alone
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _kind(part: dict) -> str:
    return "image" if part["type"] == "image_url" else part["type"]


def _places(part, kind: str) -> list:
    """The places for images (videos) in a part of a message: what stands there, or `None`."""
    if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
        raise ValueError(f"A part of a message must have a type, one of {', '.join(PART_TYPES)}, got {part!r:.200}.")
    if part["type"] == "text":
        return [None] * (part.get("text") or "").count(f"<{kind}>")
    if _kind(part) != kind:
        return []
    if part.get("base64") is not None:
        return [base64.b64decode(part["base64"])]
    return [next((part[key] for key in PART_KEYS[kind] if part.get(key) is not None), None)]


def _locate(medium, root: str | os.PathLike | None):
    """An image or video as the processor takes it: out of the dict in which it stands, under the root if a path."""
    if isinstance(medium, dict):  # of `datasets`, or OpenAI's image_url
        medium = next((medium[key] for key in ("bytes", "path", "url") if medium.get(key) is not None), None)
    if isinstance(medium, (list, tuple)):  # the frames of a video
        return [_locate(frame, root) for frame in medium]
    if medium is None:
        raise ValueError("An image or video is missing: its entry is empty.")
    is_path = isinstance(medium, (str, os.PathLike)) and not str(medium).startswith(("http://", "https://", "data:"))
    return os.path.join(root, medium) if is_path and root is not None else medium


def _split(items: list, counts: list[int]) -> list[list] | None:
    """Lists of so many items each; `None` where there are none."""
    following = iter(items)
    return [list(islice(following, count)) for count in counts] if items else None


def load_samples(sources: Iterable[Source], processor: NeoProcessor | None) -> list[dict]:
    """
    All samples of some sources, in order and in memory: for evaluation and small data sets. Bad records are skipped,
    and logged with their name and what is wrong.

    Raises:
        ValueError: not a single record of a source is good.
    """
    samples: list[dict] = []
    for source in sources:
        bad: list[str] = []
        total = len(source.records) if source.is_map_style else None
        records = tqdm(source.read(), desc=f"Encoding {source.name}", total=total, delay=3)
        samples += _encode_all(source, records, processor, bad.append)
        if bad:
            logger.warning("%s: skipped %d bad records.", source.name, len(bad))
    return samples


def _encode_all(
    source: Source, records, processor: NeoProcessor | None, skip: Callable[[str], None]
) -> Iterator[dict]:
    """The samples of the good records; `skip` is called with the name of each bad one."""
    good = False
    bad: set[int] = set()  # since the last good one
    limit = min(len(source.records), MAX_BAD_RECORDS) if source.is_map_style else MAX_BAD_RECORDS
    error: Exception | None = None
    for number, record in records:
        name = source.record_name(number)
        # So many in a row, or a second pass over records that come in their order: the source itself is bad by now.
        if len(bad) >= limit or (number in bad and not source.is_map_style):
            break
        try:
            sample = encode_record(
                source.fetch(number, record), processor, source.root, name, source.images_kwargs, source.videos_kwargs
            )
        except Exception as reason:  # of every kind, as are the ways in which a record can be bad
            logger.warning("Skipped %s: %s", name, reason)
            skip(name)
            error = reason
            bad.add(number)
            continue
        good = True
        bad.clear()
        yield sample
    else:
        if good:
            return
    which = f"the last {len(bad)} records" if good else f"all of the {len(bad)} records read"
    raise ValueError(f"{source.name}: {which} are bad, the last one: {error}") from error


def shared_counter():
    """A count to which the workers of a DataLoader, forked or spawned, can add."""
    return multiprocessing.get_context("spawn").Value("q", 0)


def this_reader() -> tuple[int, int]:
    """
    Which of how many readers this is: each worker of a DataLoader, in each process of a distributed run, is one.
    Launchers tell the process by RANK and WORLD_SIZE.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    worker = get_worker_info()
    if worker is None:
        return rank, world_size
    return rank * worker.num_workers + worker.id, world_size * worker.num_workers


class SampleStream(IterableDataset):
    """
    Samples without end, drawn from several sources by their weights; a text-only share is a source like others.

    Each process of a distributed run and each worker of a DataLoader reads its own share, so that no pass over a
    source has a record twice: the stream is not to be sharded again. The order depends on the seed and on the number
    of processes and workers alone: to resume, skip as many batches.

    Bad records are skipped, and logged with their name and what is wrong.

    Args:
        sources: with their weights.
        processor: encodes the records; `None` where all of them are samples already.
        seed: of the draw and of the order in each source.

    Raises:
        ValueError: there is no source; while reading, not a single record of a source is good.
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
        """How often a bad record was skipped in this process and its workers."""
        return self._skipped.value

    def _skip(self, name: str):
        with self._skipped.get_lock():
            self._skipped.value += 1

    def __iter__(self) -> Iterator[dict]:
        shard, num_shards = this_reader()
        draw = random.Random(f"{self.seed} {shard}")
        streams = [
            _encode_all(source, source.draw(shard, num_shards, self.seed), self.processor, self._skip)
            for source in self.sources
        ]
        weights = [source.weight for source in self.sources]
        while True:
            [stream] = draw.choices(streams, weights)
            yield next(stream)
