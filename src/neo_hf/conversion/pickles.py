"""Pickled checkpoint files, read without running anything that is in them."""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch


class Inert:
    """Stands for an object of another library: keeps its state and has no behaviour."""

    state: Any = None

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


# What the states of DeepSpeed's optimizers hold beside tensors. None of it is needed to merge the weights.
ZERO_CLASSES = (
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
)


def load_tensors(file: Path, content: IO[bytes] | None = None, classes: Iterable[tuple[type, str]] = ()) -> Any:
    """
    What `torch.load(weights_only=True)` reads from a file, mapped into memory where the format allows it.

    Args:
        file: The file, named in errors.
        content: Read this part of the file instead of all of it.
        classes: Pairs of a stand-in and the full name of the class that it stands for, allowed beside tensors.

    Raises:
        ValueError: The file holds code or classes not allowed here, is truncated or no checkpoint of torch.
    """
    try:
        with torch.serialization.safe_globals([*classes]):
            if content is not None:
                return torch.load(content, map_location="cpu", weights_only=True)
            # Only zip files, the format since torch 1.6, can be memory-mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a broken file breaks torch's reader in many ways
        raise ValueError(f"{file} cannot be read as plain tensors: {type(error).__name__}: {error}") from error


# The metadata of torch.distributed.checkpoint is a pickle of dataclasses, not of tensors: torch.load cannot read it.
# These are all the names that it contains, beside dtypes, with what stands for them.
METADATA_CLASSES: dict[tuple[str, str], Any] = {
    (f"torch.distributed.checkpoint.{module}", name): type(name, (Inert,), {})
    for module, name in (
        ("metadata", "Metadata"),
        ("metadata", "TensorStorageMetadata"),
        ("metadata", "BytesStorageMetadata"),
        ("metadata", "ChunkStorageMetadata"),
        ("metadata", "TensorProperties"),
        ("metadata", "MetadataIndex"),
        ("metadata", "StorageMeta"),
        ("filesystem", "_StorageInfo"),
    )
} | {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): Inert,
    ("pathlib", "WindowsPath"): Inert,
    ("pathlib._local", "PosixPath"): Inert,  # Python 3.13
    ("pathlib._local", "WindowsPath"): Inert,
}
TensorStorageMetadata: type[Inert] = METADATA_CLASSES["torch.distributed.checkpoint.metadata", "TensorStorageMetadata"]


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` of torch.distributed.checkpoint: `Inert` objects, plain data and dtypes; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES:
            return METADATA_CLASSES[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} is not part of the metadata of a checkpoint")
