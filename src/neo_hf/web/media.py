"""Files that people send: checked, read into memory, and deleted."""

import base64
import contextlib
import io
import mimetypes
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from neo_hf.image_processing_neo import load_image
from neo_hf.video_processing_neo import open_video

mimetypes.add_type("image/webp", ".webp")  # of photos from the page's camera; Python knows it from 3.13 on

MAX_FILE_BYTES = 64 * 2**20
MAX_FILES = 16  # with one question
MAX_IMAGE_PIXELS = 50_000_000
MAX_PIXELS = 200_000_000  # of all images of a question, which are in memory together
THUMBNAIL_SIDE = 160  # pixels
THUMBNAILS_PER_VIDEO = 4


@dataclass(frozen=True)
class Upload:
    """An image or a video: its name, its part of a message, and small images of it as `data:` URIs."""

    name: str
    part: dict[str, Any] = field(repr=False)
    thumbnails: list[str] = field(repr=False)


def read_uploads(files: Sequence[str], folder: str | os.PathLike) -> list[Upload]:
    """
    Read files into memory.

    Args:
        folder: where uploads are. What is elsewhere is not read: requests can name any path.

    Raises:
        ValueError: there are too many, or one is too large, no image or video, or cannot be read; names the file.
    """
    if len(files) > MAX_FILES:
        raise ValueError(f"A question can have up to {MAX_FILES} files, got {len(files)}.")
    root = Path(folder).resolve()
    for file in files:
        if not Path(file).resolve().is_relative_to(root):
            raise ValueError(f"{Path(file).name} was not uploaded.")
    uploads, pixels = [], 0
    for file in files:
        upload = _read_upload(Path(file))
        if image := upload.part.get("image"):
            pixels += image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"The images of a question can have up to {MAX_PIXELS // 1_000_000} megapixels together.")
        uploads.append(upload)
    return uploads


def _read_upload(file: Path) -> Upload:
    if not file.is_file():
        raise ValueError(f"{file.name} is no longer here, since uploads are deleted. Attach it again.")
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{file.name} has {size / 2**20:.0f} MB; the limit is {MAX_FILE_BYTES // 2**20} MB.")
    media_type = mimetypes.guess_type(file.name)[0] or "unknown"
    content = file.read_bytes()
    os.utime(file)  # tells `delete_old_files` that it was needed just now
    if media_type.startswith("image/"):
        return read_image(file.name, content)
    if media_type.startswith("video/"):
        return _read_video(file.name, media_type, content)
    raise ValueError(f"{file.name} is neither an image nor a video: its type is {media_type}.")


def read_image(name: str, content: bytes) -> Upload:
    """
    Decode an image.

    Raises:
        ValueError: it cannot be decoded or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as header:
                width, height = header.size
    except Exception as error:  # Pillow's decoders raise errors of all types
        raise ValueError(f"{name} cannot be read as an image. It may be damaged, or not be an image.") from error
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels; the limit is {MAX_IMAGE_PIXELS // 1_000_000} megapixels."
        )
    try:
        image = load_image(content)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as an image. It may be damaged, or not be an image.") from error
    return Upload(name, {"type": "image", "image": image}, [thumbnail(image)])


def _read_video(name: str, media_type: str, content: bytes) -> Upload:
    source = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    try:
        reader = open_video(source)
        count = reader.metadata.total_num_frames
        shown = sorted({round(n * (count - 1) / (THUMBNAILS_PER_VIDEO - 1)) for n in range(THUMBNAILS_PER_VIDEO)})
        thumbnails = [thumbnail(Image.fromarray(frame)) for frame in reader.read(shown)]
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a video. It may be damaged, or not be a video.") from error
    return Upload(name, {"type": "video", "video": source}, thumbnails)


def thumbnail(image: Image.Image) -> str:
    """A small copy as a `data:` URI; images that are small already are kept exactly."""
    small = image.convert("RGBA")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "webp", lossless=small.size == image.size, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def delete_old_files(folder: Path, max_age: float):
    """Delete the files in `folder` that were neither written nor read in the last `max_age` seconds."""
    oldest = time.time() - max_age
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folders
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.rmdir() if path.is_dir() else path.unlink()
