"""
The formats in which conversations are stored.

| conversation | turn | used by |
| --- | --- | --- |
| `messages` | `{"role": "system", "user" or "assistant", "content"}` | OpenAI, TRL |
| `conversations` | `{"from": "system", "human" or "gpt", "value"}` | LLaVA, the trainer of the released models |

The content of a turn is text or a list of parts: `{"type": "text", "text"}`; `{"type": "image"}` with the image under
`image`, `path`, `url` or `base64`; `{"type": "image_url", "image_url": {"url"}}`; `{"type": "video"}` with `video`,
`path` or `url`.

Images can also be stored beside the conversation, in a column `image` or `images`, and videos in `video` or `videos`:
each `<image>` (`<video>`) in the text, and each part without an image of its own, takes the next one. If `messages`
have no place for any of them, they are put at the start of the first user turn, as in TRL.
"""

import base64
import os
from itertools import chain
from typing import Any

# The key of the conversation, and those of a turn's role and content.
FORMATS = (("messages", "role", "content"), ("conversations", "from", "value"))
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
PART_TYPES = ("text", "image", "image_url", "video")
# The keys under which a part holds its image or video, and the columns beside the conversation.
PART_KEYS = {"image": ("image", "image_url", "path", "url"), "video": ("video", "path", "url")}
COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}


def read_conversation(record: dict, root: str | os.PathLike | None = None) -> tuple[list[dict], dict[str, list]]:
    """
    The conversation of a record, in the form that the chat template takes.

    Args:
        record: in one of the formats above.
        root: folder that relative paths start from.

    Returns:
        The messages, their content a list of parts without the media; and the media, as the processor takes them,
        under "image" and "video", in the order of their places.

    Raises:
        ValueError: the format is unknown, or the number of images or videos differs from the number of their places.
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
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        messages.append({"role": role, "content": parts})

    media: dict[str, list] = {}
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
                f"The record has {len(column)} in the column of {kind}s, but the conversation has {num_places} places "
                f"for them (<{kind}> in the text, or parts of type {kind} without one of their own)."
            )
        remaining = iter(column)
        media[kind] = [_locate(next(remaining) if place is None else place, root) for place in places]
    for message in messages:
        message["content"] = [part if part["type"] == "text" else {"type": _kind(part)} for part in message["content"]]
    return messages, media


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
        return [None] * (part.get("text") or "").count(f"<{kind}>")
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
