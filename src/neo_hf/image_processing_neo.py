"""Images to normalised patches, bit for bit as in the released checkpoints' training. Uses Pillow, not torchvision."""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

logger = logging.get_logger(__name__)

MAX_ASPECT_RATIO = 200
# Frames sampled per second of video. Ordinary cameras are not faster.
MAX_FPS = 1000

BUDGETS = ("min_pixels", "max_pixels")
COUNTS = ("max_video_tokens", "num_frames", "max_frames", "patch_size", "spatial_merge_size")


class NeoImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    min_pixels, max_pixels (`int`, *optional*, defaults to 65536 and 4194304):
        Pixel budget of an image. Rounding may exceed it slightly.
    patch_size (`int`, *optional*, defaults to 16):
        Side of a patch in pixels.
    spatial_merge_size (`int`, *optional*, defaults to 2):
        A visual token covers `spatial_merge_size` x `spatial_merge_size` patches.
    share_pixel_budget (`bool`, *optional*, defaults to `False`):
        Limit each of n > 1 images of a sample to `max(2 * max_pixels // n, min_pixels)`, as in training. A sample is
        an inner list of images, or all images if the list is flat.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    spatial_merge_size: int
    share_pixel_budget: bool


def check_settings(settings: Mapping[str, Any]):
    """
    Check the numeric settings of an image or video processor. `None` passes; code that requires a value checks that.

    Raises:
        ValueError: if a setting is not a number, not finite or out of range; names the setting and quotes the value.
    """
    for name in (*BUDGETS, *COUNTS):
        value: Any = settings.get(name)
        if value is not None and (not _is_number(value, Integral) or (value < 1 and name in COUNTS)):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    for name in ("start", "end"):
        value = settings.get(name)
        if value is not None and not _is_number(value):
            raise ValueError(f"{name} must be a finite number of seconds, got {value!r}.")
    fps: Any = settings.get("fps")
    if fps is not None and not (_is_number(fps) and 0 < fps <= MAX_FPS):
        raise ValueError(f"fps must be a positive number of frames per second, at most {MAX_FPS}, got fps={fps!r}.")
    indices = settings.get("frames_indices")
    if indices is not None:
        if not isinstance(indices, (list, tuple, range, np.ndarray)):
            raise ValueError(f"frames_indices must be a list of integers, got {indices!r}.")
        wrong = [index for index in indices if not _is_number(index, Integral)]
        if wrong:
            raise ValueError(f"frames_indices must be integers, got {wrong[:5]!r}.")
    scale: Any = settings.get("rescale_factor")
    if scale is not None and not (_is_number(scale) and scale > 0):
        raise ValueError(f"rescale_factor must be a positive number, got {scale!r}.")
    for name in ("image_mean", "image_std"):
        value = settings.get(name)
        entries = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and not all(_is_number(x) and (x > 0 or name == "image_mean") for x in entries):
            raise ValueError(f"{name} must be finite{' and positive' * (name == 'image_std')}, got {value!r}.")


def check_names(settings: Mapping[str, Any], known: Iterable[str], strict: bool = True):
    """
    Raise a `ValueError` if a setting is unknown, quoting the closest known name. If not `strict`, raise only if there
    is a close name: others may be meant for a chat template.
    """
    known = sorted(known)
    for name, value in settings.items():
        if name in known:
            continue
        close = get_close_matches(name, known, n=1, cutoff=0.75)
        if strict or close:
            hint = f"Did you mean {close[0]}?" if close else f"Settings are {', '.join(known)}."
            raise ValueError(f"Unknown setting {name}={value!r:.50}. {hint}")


def _is_number(value, kind: type = Real) -> bool:
    """Whether `value` is a finite number of this kind. Booleans do not count as numbers."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """
    Compute the size to which an image is resized: sides are rounded to multiples of `factor`, and scaled together if
    their product is outside the pixel budget.

    Args:
        height, width: size of the image in pixels.
        factor: side of a visual token in pixels.
        min_pixels, max_pixels: pixel budget.

    Returns:
        Height and width in pixels.

    Raises:
        ValueError: if a side is 0 or the aspect ratio exceeds 200.
    """
    if min(height, width) < 1:
        raise ValueError(f"An image must have at least 1x1 pixels (height x width), got {height}x{width}.")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"The sides of an image may differ by a factor of {MAX_ASPECT_RATIO} at most, got {height}x{width} pixels "
            "(height x width)."
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def fetch(source: str | os.PathLike) -> str | io.BytesIO:
    """
    Download an http(s) URL or decode a `data:` URI into memory; any other source is a path and returned as is.

    Raises:
        ValueError: if the path is a folder, or a pipe or device, which may never end.
    """
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, follow_redirects=True, timeout=60)
        response.raise_for_status()
        return io.BytesIO(response.content)
    if source.startswith("data:"):
        return io.BytesIO(base64.b64decode(source.partition(",")[2]))
    if os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("it is not a regular file")
    return source


def describe_source(source: str | os.PathLike | bytes) -> str:
    """A short name of a source for error messages."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    return name if len(name) <= 200 else name[:100] + "..."


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """
    Convert the pixels of an image or video to uint8: floats within 0..1 are scaled by 255, other numbers must be
    within 0..255 and are rounded, booleans become 0 and 255.

    Raises:
        ValueError: if they are not real numbers, not finite or out of range; quotes dtype and range.
    """
    if pixels.dtype == np.uint8 or not pixels.size:
        return pixels.astype(np.uint8, copy=False)
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    if not np.issubdtype(pixels.dtype, np.integer) and not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"Pixels must be real numbers, got an array of {pixels.dtype}.")
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"Pixels must be finite and within 0..255, or floats within 0..1, got {pixels.dtype} from {low} to "
            f"{high}. Divide 16-bit pixels by 257."
        )
    if np.issubdtype(pixels.dtype, np.floating) and high <= 1:
        pixels = pixels.astype(np.float32) * 255
    return np.rint(pixels).astype(np.uint8)


def tensor_to_array(pixels: torch.Tensor) -> np.ndarray:
    """Convert a tensor on any device, with or without gradient, to an array; bfloat16 becomes float32."""
    pixels = pixels.detach().cpu()
    return (pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy()


def load_image(source: str | os.PathLike | bytes) -> Image.Image:
    """
    Read an image from a path, an http(s) URL, a `data:` URI, a base64 string or bytes. Applies the EXIF orientation
    and keeps the mode, since transparency is handled later.

    Raises:
        ValueError: if it cannot be read as an image; names the source and the reason.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else fetch(source)
        if isinstance(file, str) and len(file) >= 200 and not os.path.exists(file):  # no image is shorter in base64
            file = io.BytesIO(base64.b64decode(file))
        with Image.open(file) as image:
            return _upright(image)
    except Exception as error:  # Pillow's decoders raise errors of all types
        raise ValueError(
            f"Cannot read the image {describe_source(source)}: {type(error).__name__}: {error}"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says; if that is nothing to do, the image itself, not a copy."""
    image.load()
    return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image


class NeoImageProcessor(PilBackend):
    """
    Turns N images into `pixel_values` (P, 3 * patch_size^2), the concatenated float32 patches of all images (row-major
    per image, channel-major within a patch), and `image_grid_hw` (N, 2), int64 (rows, columns) in patches.
    """

    do_convert_rgb = True
    do_resize = True
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    min_pixels = 65536
    max_pixels = 4194304
    patch_size = 16
    spatial_merge_size = 2
    share_pixel_budget = False
    valid_kwargs = NeoImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]

    def __init__(self, **kwargs: Unpack[NeoImageProcessorKwargs]):
        super().__init__(**kwargs)
        self._check_settings(vars(self))

    def preprocess(self, images: ImageInput, *args, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: an image, a list of images or a list of lists of images.
            kwargs: settings for this call (`NeoImageProcessorKwargs`).

        Raises:
            ValueError: if a setting is unknown or out of range, or an image cannot be read; quotes the value.
        """
        check_names(kwargs, self.valid_kwargs.__annotations__)
        self._check_settings(kwargs)
        return super().preprocess(images, *args, **kwargs)

    def fetch_images(self, images):
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, bytes, os.PathLike)):
            return load_image(images)
        if isinstance(images, Image.Image):
            return _upright(images)
        if getattr(images, "ndim", 0) == 2:  # gray
            return images[..., None]
        return super().fetch_images(images)

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> np.ndarray:
        """Convert an image (Pillow, numpy or torch) to an array (channels, height, width)."""
        if isinstance(image, Image.Image):
            image = self.convert_to_rgb(image) if do_convert_rgb else np.array(image)
            input_data_format = ChannelDimension.LAST
        elif isinstance(image, torch.Tensor):
            image = tensor_to_array(image)
        if not isinstance(image, np.ndarray):
            raise ValueError(f"An image must be a Pillow image, an array or a tensor, got {type(image).__name__}.")
        if image.ndim == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        if input_data_format is None:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        if do_convert_rgb:
            image = self.convert_to_rgb(image, input_data_format)
        return np.moveaxis(image, -1, 0) if input_data_format == ChannelDimension.LAST else image

    def convert_to_rgb(self, image, input_data_format: str | ChannelDimension | None = None) -> np.ndarray:
        """
        Convert to RGB as in training: an RGBA image with some but not all pixels fully transparent is composited on
        white, and in any other image the alpha channel is dropped.

        Returns:
            (height, width, 3) for a Pillow image; an array keeps its layout.
        """
        if isinstance(image, np.ndarray):
            layout = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
            axis = -1 if layout == ChannelDimension.LAST else 0
            channels = image.shape[axis]
            if channels == 3:
                return image
            if channels == 1:
                return image.repeat(3, axis=axis)
            if image.dtype != np.uint8:
                raise ValueError(f"An image with transparency must be uint8, got {image.dtype} {image.shape}.")
            rgb = self.convert_to_rgb(Image.fromarray(np.moveaxis(image, axis, -1), "RGBA"))
            return np.moveaxis(rgb, -1, axis)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            _warn_of_lost_values(image)
        if image.mode == "RGBA":
            transparent = np.asarray(image.getchannel("A")) == 0
            if transparent.any() and not transparent.all():
                white = Image.new("RGB", image.size, (255, 255, 255))
                white.paste(image, mask=image.getchannel("A"))
                image = white
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))

    def _validate_preprocess_kwargs(self, **kwargs):
        self._check_settings(kwargs)
        if kwargs.get("size") is not None:
            raise ValueError(
                f"The size of an image follows from min_pixels and max_pixels, got size={kwargs['size']}."
            )
        # With do_resize, the base class would require `size`.
        super()._validate_preprocess_kwargs(**{**kwargs, "do_resize": False})

    def _check_settings(self, settings: Mapping[str, Any]):
        settings = {name: settings.get(name, getattr(self, name, None)) for name in self.valid_kwargs.__annotations__}
        check_settings(settings)
        _check_budget(settings["min_pixels"], settings["max_pixels"])

    def _preprocess_image_like_inputs(self, images: ImageInput, **kwargs) -> BatchFeature:
        min_pixels, max_pixels = kwargs["min_pixels"], kwargs.pop("max_pixels")
        prepared = self._prepare_image_like_inputs(images, **kwargs)
        if not prepared:
            raise ValueError("Expected at least one image, got none.")
        budgets = [max_pixels] * len(prepared)
        if kwargs.pop("share_pixel_budget"):
            nested = isinstance(images, (list, tuple)) and all(isinstance(sample, (list, tuple)) for sample in images)
            counts = [len(sample) for sample in images] if nested else [len(prepared)]
            budgets = [shared_budget(max_pixels, min_pixels, n) for n in counts for _ in range(n)]
        return self._preprocess(prepared, max_pixels=budgets, **kwargs)

    def _preprocess(
        self,
        images: Iterable[np.ndarray],
        do_resize: bool,
        resample: "PILImageResampling",
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: list[float],
        image_std: list[float],
        min_pixels: int,
        max_pixels: list[int],
        patch_size: int,
        spatial_merge_size: int,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        factor = patch_size * spatial_merge_size
        resized, grids = [], []
        for image, budget in zip(images, max_pixels, strict=True):
            if do_rescale or not np.issubdtype(image.dtype, np.floating):
                image = to_uint8(image)
            height, width = image.shape[1:]
            if do_resize:
                height, width = smart_resize(height, width, factor, min_pixels, budget)
                if image.dtype != np.uint8 or image.shape[1:] != (height, width):
                    image = self.resize(image, SizeDict(height=height, width=width), resample)
            elif height % factor or width % factor or not height * width:
                raise ValueError(
                    f"Without do_resize, the sides of an image must be positive multiples of {factor} pixels, got "
                    f"{height}x{width} (height x width)."
                )
            resized.append(image)
            grids.append((height // patch_size, width // patch_size))
        counts = [rows * columns for rows, columns in grids]
        patches = np.empty((sum(counts), resized[0].shape[0], patch_size, patch_size), dtype=np.float32)
        for part, image, grid in zip(np.split(patches, np.cumsum(counts)[:-1]), resized, grids, strict=True):
            cut = image.reshape(-1, grid[0], patch_size, grid[1], patch_size)
            part.reshape(*grid, *part.shape[1:])[:] = cut.transpose(1, 3, 0, 2, 4)
        # In place, since patches are large; in this order and in float32, bit-exact.
        if do_rescale and rescale_factor != 1:
            patches /= np.float32(1 / rescale_factor)
        if do_normalize:
            mean, std = (np.array(x, dtype=np.float32).reshape(-1, 1, 1) for x in (image_mean, image_std))
            patches -= mean
            patches /= std
        data = {
            "pixel_values": patches.reshape(len(patches), -1),
            "image_grid_hw": np.array(grids, dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Number of patches of an image of `height` x `width` pixels; `images_kwargs` override settings."""
        settings = {
            name: getattr(self, name) for name in ("patch_size", "spatial_merge_size", "min_pixels", "max_pixels")
        }
        settings |= {name: value for name, value in (images_kwargs or {}).items() if name in settings}
        factor = settings["patch_size"] * settings["spatial_merge_size"]
        new_height, new_width = smart_resize(height, width, factor, settings["min_pixels"], settings["max_pixels"])
        return (new_height // settings["patch_size"]) * (new_width // settings["patch_size"])


def shared_budget(max_pixels: int, min_pixels: int, count: int) -> int:
    """`max_pixels` of each of `count` images in a training sample."""
    return max(2 * max_pixels // count, min_pixels) if count > 1 else max_pixels


def _warn_of_lost_values(image: Image.Image):
    """Warn if converting an image of more than 8 bits to RGB, which clips and truncates, loses its content."""
    pixels = np.asarray(image)
    if not pixels.size:
        return
    if not np.isfinite(pixels).all():
        raise ValueError(f"Pixels must be finite, got an image of mode {image.mode} with NaN or infinite values.")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 255 or (image.mode == "F" and 0 < high <= 1):
        logger.warning(
            f"An image of mode {image.mode} has values from {low} to {high}. As in training, they are clipped to "
            "0..255 without scaling; scale them first to keep what they show."
        )


def _check_budget(min_pixels: int, max_pixels: int):
    if min_pixels is None or max_pixels is None or not 0 < min_pixels <= max_pixels:
        raise ValueError(f"min_pixels must be positive and at most max_pixels, got {min_pixels} and {max_pixels}.")


__all__ = ["NeoImageProcessor"]
