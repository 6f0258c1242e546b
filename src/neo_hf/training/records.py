"""
The formats in which training data is stored: conversations and documents.

| conversation | turn | used by |
| --- | --- | --- |
| `messages` | `{"role": "system", "user" or "assistant", "content"}` | OpenAI, TRL |
| `conversations` | `{"from": "system", "human" or "gpt", "value"}` | LLaVA, the trainer of the released models |

The content of a turn is text or a list of parts: `{"type": "text", "text"}`; `{"type": "image"}` with the image under
`image`, `path`, `url` or `base64`; `{"type": "image_url", "image_url": {"url"}}`; `{"type": "video"}` with `video`,
`path` or `url`. An answer with `is_input` is part of the prompt: it is not learnt.

Images can also be stored beside the conversation, in a column `image` or `images`, and videos in `video` or `videos`:
each `<image>` (`<video>`) in the text, and each part without an image of its own, takes the next one. If there is no
place for any of them, they are put at the start of the first user turn: all of them in `messages`, as in TRL; a single
one in `conversations`, as in the trainer of the released models.

Other formats:

- `image` and `caption`: the image is asked about without words, and the caption is the answer.
- `text`: a document without images.
- `texts` and `images`, lists: an interleaved document, as OmniCorpus and MMC4 store it. Where one list has an entry,
  the other has `None`.
- Several conversations in one record, as a list of records or of lists of turns: a sample for each of them.
- Records of a WebDataset: fields `json`, an object with any of the above or a list of turns; images (`jpg`, `0.png`,
  ...), in the order of their names, `2.png` before `10.png`; `txt`, the caption if there are images.
"""

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

# The key of the conversation, and those of a turn's role and content.
FORMATS = (("messages", "role", "content"), ("conversations", "from", "value"))
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
PART_TYPES = ("text", "image", "image_url", "video")
# The keys under which a part holds its image or video, and the columns beside the conversation.
PART_KEYS = {"image": ("image", "image_url", "path", "url"), "video": ("video", "path", "url")}
COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}
PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


@dataclass
class Content:
    """
    What a record says.

    Args:
        messages: in the form that the chat template takes, the content of each a list of parts without the media. An
            answer that is not learnt has `is_input`.
        text: of a document, in place of messages, with `<image>` where its images are.
        media: as the processor takes them, under "image" and "video", in the order of their places.
    """

    messages: list[dict] = field(default_factory=list)
    text: str | None = None
    media: dict[str, list] = field(default_factory=lambda: {"image": [], "video": []})


def prepare_records(record: Any, columns: Mapping[str, str]) -> list:
    """
    What is stored as one record, as records for `read_record`: several, where one packs several conversations. Images
    and videos beside these are dealt out in the order of their places.

    Args:
        record: as it is stored.
        columns: names above, and those that the record has in their place, if it has them.
    """
    if isinstance(record, list):
        return [part for one in record for part in prepare_records(one, columns)]
    if not isinstance(record, dict):
        return [record]
    if "__key__" in record:
        content = record.get("json")
        if isinstance(content, list):
            turns = [turn for turn in content if isinstance(turn, dict)]
            content = {key: content for key, role, _ in FORMATS if any(turn.get(role) for turn in turns)}
        record = {**record, **content} if isinstance(content, dict) else record
    renamed = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    record = {name: value for name, value in record.items() if name not in columns.values()} | renamed
    return _split_conversations(_name_fields(record) if "__key__" in record else record)


def _name_fields(record: dict) -> dict:
    """A record of a WebDataset, whose fields are named after the suffixes of files, with names of columns instead."""
    images = [record[name] for name in sorted(record, key=_split_numbers) if name.lower().endswith(IMAGE_SUFFIXES)]
    if images and not _column(record, "image"):
        record = {**record, "images": [image for image in images if image is not None]}
    if record.get("txt") is not None:
        record = {"caption" if images else "text": record["txt"], **record}
    return record


def _split_numbers(name: str) -> list:
    """A name to sort by, its numbers as such: 2.png comes before 10.png."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _split_conversations(record: dict) -> list[dict]:
    key, _, content_key = next((keys for keys in FORMATS if isinstance(record.get(keys[0]), list)), (None, None, ""))
    if key is None or not any(isinstance(turn, list) for turn in record[key]):
        return [record]
    columns = {kind: _column(record, kind) for kind in COLUMNS}
    rest = {name: value for name, value in record.items() if name not in chain(*COLUMNS.values())}
    records = []
    for number, turns in enumerate(record[key], start=1):
        conversation = {**rest, key: turns}
        for kind, column in columns.items():
            # What is left over goes to the last one, which then says so.
            count = len(column) if number == len(record[key]) else _count_places(turns, content_key, kind)
            conversation[COLUMNS[kind][1]], column[:count] = column[:count], []
        records.append(conversation)
    return records


def read_record(record: dict, root: str | os.PathLike | None = None) -> Content:
    """
    Read a record in one of the formats above.

    Args:
        record: not one that packs several conversations, see `prepare_records`.
        root: folder that relative paths start from.

    Raises:
        ValueError: the format is unknown, or the number of images or videos differs from the number of their places.
    """
    if any(record.get(key) is not None for key, _, _ in FORMATS):
        return _read_conversation(record, root)
    if record.get("texts") is not None:
        return _read_interleaved(record, root)
    for key in ("caption", "text"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise ValueError(f"`{key}` must be text, got {record[key]!r:.200}.")
    if record.get("caption") is not None:
        turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": record["caption"]}]
        columns = {name: record.get(name) for name in COLUMNS["image"]}
        return _read_conversation({"conversations": turns, **columns}, root)
    if record.get("text") is not None:
        return Content(text=record["text"])
    known = ", ".join([*(keys[0] for keys in FORMATS), "texts", "caption", "text", "input_ids"])
    raise ValueError(f"A record must have one of {known}; it has {sorted(map(str, record))}.")


def _read_interleaved(record: dict, root: str | os.PathLike | None) -> Content:
    texts, images = record["texts"], record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise ValueError(
            "`texts` and `images` of an interleaved document must be lists of the same length, None where the other "
            f"has an entry, got {texts!r:.100} and {images!r:.100}."
        )
    pieces, media = [], []
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise ValueError(
                f"At each place of an interleaved document there must be a text or an image, got {text!r:.100} and "
                f"{image!r:.100}."
            )
        if image is not None:
            media.append(_locate(image, root))
        elif not isinstance(text, str):
            raise ValueError(f"`texts` must be texts, got {text!r:.100}.")
        elif PLACEHOLDERS["image"] in text:
            raise ValueError(f"A text of an interleaved document contains {PLACEHOLDERS['image']}: {text!r:.100}.")
        pieces.append(PLACEHOLDERS["image"] if text is None else text)
    return Content(text="\n".join(pieces), media={"image": media, "video": []})


def _read_conversation(record: dict, root: str | os.PathLike | None) -> Content:
    conversation, role_key, content_key = next(keys for keys in FORMATS if record.get(keys[0]) is not None)
    messages: list[dict] = []
    for turn in record[conversation]:
        role = ROLES.get(str(turn.get(role_key))) if isinstance(turn, dict) else None
        if role is None:
            raise ValueError(f"A turn must have a `{role_key}`, one of {', '.join(ROLES)}, got {turn!r:.200}.")
        content = turn.get(content_key) or ""
        if not isinstance(content, (str, list)):
            raise ValueError(f"`{content_key}` must be text or a list of parts, got {content!r:.200}.")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        messages.append({"role": role, "content": parts, "is_input": bool(turn.get("is_input"))})

    media: dict[str, list] = {}
    for kind in COLUMNS:
        column = _column(record, kind)
        places = [place for message in messages for part in message["content"] for place in _places(part, kind)]
        if column and not places and (conversation == "messages" or len(column) == 1):
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is not None:
                places = [None] * len(column)
                first["content"] = [{"type": kind}] * len(column) + first["content"]
        if (num_places := sum(place is None for place in places)) != len(column):
            raise ValueError(
                f"The record has {len(column)} in the column of {kind}s, but the conversation has {num_places} places "
                f"for them ({PLACEHOLDERS[kind]} in the text, or parts of type {kind} without one of their own)."
            )
        remaining = iter(column)
        media[kind] = [_locate(next(remaining) if place is None else place, root) for place in places]
    for message in messages:
        message["content"] = [part if part["type"] == "text" else {"type": _kind(part)} for part in message["content"]]
    return Content(messages=messages, media=media)


def _column(record: dict, kind: str) -> list:
    """The images or videos beside a conversation."""
    return list(chain.from_iterable(_as_list(record.get(name)) for name in COLUMNS[kind]))


def _count_places(turns: Any, content_key: str, kind: str) -> int:
    """How many images (videos) of the column a conversation has places for, as far as it can be read."""
    contents = [turn.get(content_key) for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    texts = [content for content in contents if isinstance(content, str)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    places = [place for part in parts for place in _places(part, kind)]
    return sum(place is None for place in places) + sum(text.count(PLACEHOLDERS[kind]) for text in texts)


def _as_list(value) -> list:
    if value is None or value == "":  # some datasets mark text-only records with ""
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _kind(part: dict) -> str:
    return "image" if part["type"] == "image_url" else part["type"]


def _places(part: Any, kind: str) -> list:
    """The places for images (videos) in a part of a message: the image itself, or `None` if it is in the column."""
    if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
        raise ValueError(f"A part of a message must have a type, one of {', '.join(PART_TYPES)}, got {part!r:.200}.")
    if part["type"] == "text":
        return [None] * (part.get("text") or "").count(PLACEHOLDERS[kind])
    if _kind(part) != kind:
        return []
    if part.get("base64") is not None:
        return [base64.b64decode(part["base64"])]
    return [next((part[key] for key in PART_KEYS[kind] if part.get(key) is not None), None)]


def _locate(medium: Any, root: str | os.PathLike | None) -> Any:
    """An image or video as the processor takes it: unwrapped from its dict, a relative path joined to the root."""
    if isinstance(medium, dict):  # from `datasets`, or OpenAI's image_url
        medium = next((medium[key] for key in ("bytes", "path", "url") if medium.get(key) is not None), None)
    if isinstance(medium, (list, tuple)):  # the frames of a video
        return [_locate(frame, root) for frame in medium]
    if medium is None:
        raise ValueError("An image or video is missing: its entry is empty.")
    is_path = isinstance(medium, (str, os.PathLike)) and not str(medium).startswith(("http://", "https://", "data:"))
    return os.path.join(root, medium) if is_path and root is not None else medium
