"""Images to normalised patches, exactly as the released checkpoints were trained on: Pillow, no torchvision."""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)

import base64
import io
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps
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
from transformers.utils import TensorType
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

MAX_ASPECT_RATIO = 200


class NeoImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    min_pixels, max_pixels (`int`, *optional*, defaults to 65536 and 4194304):
        Pixel budget of an image. Rounding can leave it slightly.
    patch_size (`int`, *optional*, defaults to 16):
        Side of a patch in pixels.
    spatial_merge_size (`int`, *optional*, defaults to 2):
        A visual token folds `spatial_merge_size` x `spatial_merge_size` patches.
    share_pixel_budget (`bool`, *optional*, defaults to `False`):
        The rule of training for samples of n > 1 images: each gets `max(2 * max_pixels // n, min_pixels)` at most. A
        sample is an inner list of images, or all of them where they are not nested.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    spatial_merge_size: int
    share_pixel_budget: bool


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """
    The size to which an image is resized: sides are multiples of `factor`, close to the image's own, and their
    product is close to the budget where the image lies outside of it.

    Args:
        height, width: of the image, in pixels.
        factor: side of a visual token in pixels.
        min_pixels, max_pixels: the budget.

    Returns:
        Height and width in pixels.

    Raises:
        ValueError: a side is 0, or the sides differ by more than a factor of 200.
    """
    if min(height, width) < 1:
        raise ValueError(f"An image must have at least 1x1 pixels (height x width), got {height}x{width}.")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"The sides of an image may differ by a factor of {MAX_ASPECT_RATIO} at most, got {height}x{width} "
            "pixels (height x width)."
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


def load_image(source: str | os.PathLike | bytes) -> Image.Image:
    """
    Read an image from a path, an http(s) URL, a `data:` URI, a base64 string or bytes, upright (EXIF). Keeps its
    mode, as what happens to transparency is decided later.

    Raises:
        ValueError: it cannot be read as an image; names the source and the reason.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    name = name if len(name) <= 200 else name[:100] + "..."
    try:
        if isinstance(source, bytes):
            file: Any = io.BytesIO(source)
        elif str(source).startswith(("http://", "https://")):
            response = get_session().get(str(source), follow_redirects=True, timeout=60)
            response.raise_for_status()
            file = io.BytesIO(response.content)
        elif str(source).startswith("data:"):
            file = io.BytesIO(base64.b64decode(str(source).partition(",")[2]))
        elif os.path.exists(source) or len(str(source)) < 200:  # no image fits into so short a base64 string
            file = source
        else:
            file = io.BytesIO(base64.b64decode(str(source)))
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise errors of every kind
        raise ValueError(f"Cannot read the image {name}: {type(error).__name__}: {error}") from error


class NeoImageProcessor(PilBackend):
    """
    Turns images into `pixel_values` (P, 3 * patch_size^2), float32 patches of all images one after another,
    channel-major inside, row-major over each image, and `image_grid_hw` (N, 2), (rows, columns) in patches.
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
        _check_budget(self.min_pixels, self.max_pixels)

    def fetch_images(self, images):
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, bytes, os.PathLike)):
            return load_image(images)
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
        """An image (Pillow, numpy or torch) as an array (channels, height, width)."""
        if isinstance(image, Image.Image):
            image = self.convert_to_rgb(image) if do_convert_rgb else np.array(image)
            input_data_format = ChannelDimension.LAST
        elif isinstance(image, torch.Tensor):
            image = image.cpu().numpy()
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
        An RGBA image of which some pixels, but not all, are fully transparent is laid on white. All else is a plain
        conversion, which forgets transparency: so the models were trained.

        Returns:
            (height, width, 3), or an array as it was where it has no transparency.
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
        if image.mode == "RGBA":
            transparent = np.asarray(image.getchannel("A")) == 0
            if transparent.any() and not transparent.all():
                white = Image.new("RGB", image.size, (255, 255, 255))
                white.paste(image, mask=image.getchannel("A"))
                image = white
        return np.asarray(image.convert("RGB"))

    def _validate_preprocess_kwargs(self, **kwargs):
        _check_budget(kwargs["min_pixels"], kwargs["max_pixels"])
        if kwargs.get("size") is not None:
            raise ValueError(
                f"The size of an image follows from min_pixels and max_pixels, got size={kwargs['size']}."
            )
        # The size follows from the budget and each image: there is no `size` to be checked.
        super()._validate_preprocess_kwargs(**{**kwargs, "do_resize": False})

    def _preprocess_image_like_inputs(self, images: ImageInput, **kwargs) -> BatchFeature:
        min_pixels, max_pixels = kwargs["min_pixels"], kwargs.pop("max_pixels")
        prepared = self._prepare_image_like_inputs(images, **kwargs)
        if not prepared:
            raise ValueError("There must be at least one image, got none.")
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
        patches, grids = [], []
        for image, budget in zip(images, max_pixels, strict=True):
            height, width = image.shape[1:]
            if do_resize:
                height, width = smart_resize(height, width, factor, min_pixels, budget)
                image = self.resize(image, SizeDict(height=height, width=width), resample)
            elif height % factor or width % factor or not height * width:
                raise ValueError(
                    f"Without do_resize, the sides of an image must be positive multiples of {factor} pixels, got "
                    f"{height}x{width} (height x width)."
                )
            image = image.astype(np.float32)
            if do_rescale:
                image = image / np.float32(1 / rescale_factor)  # to the bit what division by 255 gives
            if do_normalize:
                mean, std = (np.array(x, dtype=np.float32).reshape(-1, 1, 1) for x in (image_mean, image_std))
                image = (image - mean) / std
            rows, columns = height // patch_size, width // patch_size
            image = image.reshape(-1, rows, patch_size, columns, patch_size).transpose(1, 3, 0, 2, 4)
            patches.append(image.reshape(rows * columns, -1))
            grids.append((rows, columns))
        data = {"pixel_values": np.concatenate(patches), "image_grid_hw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of `height` x `width` pixels; `images_kwargs` may change its pixel budget."""
        settings = {
            name: getattr(self, name) for name in ("patch_size", "spatial_merge_size", "min_pixels", "max_pixels")
        }
        settings |= {name: value for name, value in (images_kwargs or {}).items() if name in settings}
        factor = settings["patch_size"] * settings["spatial_merge_size"]
        new_height, new_width = smart_resize(height, width, factor, settings["min_pixels"], settings["max_pixels"])
        return (new_height // settings["patch_size"]) * (new_width // settings["patch_size"])


def shared_budget(max_pixels: int, min_pixels: int, count: int) -> int:
    """What each of `count` images of a sample may have of a pixel budget in training."""
    return max(2 * max_pixels // count, min_pixels) if count > 1 else max_pixels


def _check_budget(min_pixels: int, max_pixels: int):
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"min_pixels must be positive and at most max_pixels, got {min_pixels} and {max_pixels}.")


__all__ = ["NeoImageProcessor"]
