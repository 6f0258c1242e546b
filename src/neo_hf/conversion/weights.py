"""Checkpoints on disk, read and written tensor by tensor: peak memory is independent of the model's size."""

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Checkpoint:
    """
    The tensors of a checkpoint by name, in the order of their files.

    infos: Shape and dtype of each tensor.
    readers: Function that reads each tensor.
    files: Files that hold the weights.
    """

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    readers: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def read(self, name: str) -> torch.Tensor:
        return self.readers[name]()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """
    Open the weights in a folder: `model.safetensors` or `pytorch_model.bin`, in one file or in shards with an index; a
    folder of torch.distributed.checkpoint (FSDP), or one that holds it as the Trainer writes it; a DeepSpeed ZeRO
    folder.

    Raises:
        ValueError: There are no weights, or a file is missing, truncated, outside the folder, holds a tensor for the
            second time or anything but plain tensors. The message names the file.
    """
    folder = Path(folder)
    for stem, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_pickles)):
        if (folder / f"{stem}.index.json").exists():
            return opener(_files_of_index(folder / f"{stem}.index.json"))
        if (folder / stem).exists():
            return opener({folder / stem: None})
    for distributed in (folder, *sorted(folder.glob("pytorch_model_fsdp_*"))):
        if (distributed / ".metadata").exists():
            return _open_distributed(distributed)
    if (folder / "latest").exists():
        return _open_zero(folder)
    raise ValueError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin (or their index), nor a folder "
        "of torch.distributed.checkpoint (.metadata) or DeepSpeed (latest)."
    )


def _files_of_index(index: Path) -> dict[Path, set[str] | None]:
    """The names that an index lists for each shard."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: str(file) for name, file in weight_map.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a shard index: {type(error).__name__}: {error}") from error
    shards: dict[Path, set[str] | None] = {}
    for name, file in files.items():
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r} for {name}: shards must be in the same folder as their index.")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index} names {file} for {name}, which is missing.")
        names = shards.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    return shards


def _compare_with_index(file: Path, found: set[str], expected: set[str] | None, earlier: Mapping[str, object]):
    if twice := sorted(found & set(earlier)):
        raise ValueError(f"{file} repeats tensors of an earlier shard: {', '.join(twice)}.")
    if expected is not None and found != expected:
        differing = ", ".join(sorted(found ^ expected))
        raise ValueError(f"{file} and its index disagree on these tensors: {differing}.")


def _open_safetensors(files: Mapping[Path, set[str] | None]) -> Checkpoint:
    checkpoint = Checkpoint(files=[*files])

    def read(file: Path, name: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:  # opened every time, so that pages read before can be freed
            return opened.get_tensor(name)

    for file, expected in files.items():
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
                described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read, it may be truncated: {error}") from error
        if unknown := {dtype for _, dtype in described.values()} - DTYPES.keys():
            raise ValueError(f"{file} holds tensors of dtype {sorted(unknown)}, supported are {sorted(DTYPES)}.")
        infos = {name: TensorInfo(shape, DTYPES[dtype]) for name, (shape, dtype) in described.items()}
        _compare_with_index(file, set(infos), expected, checkpoint.infos)
        checkpoint.infos |= infos
        checkpoint.readers |= {name: partial(read, file, name) for name in infos}
    return checkpoint


def _open_pickles(files: Mapping[Path, set[str] | None]) -> Checkpoint:
    checkpoint = Checkpoint(files=[*files])
    for file, expected in files.items():
        try:
            # Only zip files, the format since torch 1.6, can be memory-mapped.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} cannot be read as plain tensors: {error}") from error
        if not isinstance(tensors, Mapping):
            raise ValueError(f"{file} must hold tensors by name, got a {type(tensors).__name__}.")
        other = [str(name) for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if other:
            raise ValueError(f"{file} holds more than plain tensors: {', '.join(other)}.")
        _compare_with_index(file, set(tensors), expected, checkpoint.infos)
        checkpoint.infos |= {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        checkpoint.readers |= {name: partial(tensors.__getitem__, name) for name in tensors}
    return checkpoint


def _open_distributed(folder: Path) -> Checkpoint:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # torch's reader unpickles, and raises whatever the broken part causes
        raise ValueError(f"{folder / '.metadata'} cannot be read: {type(error).__name__}: {error}") from error

    def read(name: str, info: TensorInfo) -> torch.Tensor:
        state = {name: torch.empty(info.shape, dtype=info.dtype)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return state[name]

    infos = {
        name: TensorInfo(tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    readers: dict[str, Callable[[], torch.Tensor]] = {name: partial(read, name, infos[name]) for name in infos}
    return Checkpoint(infos, readers, sorted(folder.glob("*.distcp")))


def _open_zero(folder: Path) -> Checkpoint:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ValueError(f"{folder} is a DeepSpeed folder, which needs `pip install neo-hf[deepspeed]`.") from error
    tensors = get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)

    def read(name: str) -> torch.Tensor:
        return tensors[name].contiguous()

    infos = {name: TensorInfo(tuple(tensor.shape), torch.float32) for name, tensor in tensors.items()}
    step = (folder / "latest").read_text().strip()
    return Checkpoint(infos, {name: partial(read, name) for name in infos}, sorted((folder / step).glob("*.pt")))


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    progress: tqdm,
):
    """
    Write a safetensors file with one tensor in memory at a time (the library needs them all at once).

    Args:
        path: The file.
        infos: Shape and dtype of each tensor.
        read: Returns a tensor by name, with the shape and dtype of its info.
        progress: Progress bar in bytes.
    """
    # Wide dtypes first, which keeps all tensors aligned.
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + infos[name].num_bytes
        info = infos[name]
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": [*info.shape], "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            tensor = read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (infos[name].shape, infos[name].dtype), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            progress.update(infos[name].num_bytes)


def write_shards(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str = "5GB",
):
    """Write `model.safetensors`, or shards of at most `max_shard_size` and their index."""
    plan = split_state_dict_into_shards_factory(
        dict(infos),
        get_storage_size=lambda info: info.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total = sum(info.num_bytes for info in infos.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for file, names in plan.filename_to_tensors.items():
            write_safetensors(folder / file, {name: infos[name] for name in names}, read, progress)
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with file.open("rb", buffering=0) as opened:
        while length := opened.readinto(block):
            digest.update(memoryview(block)[:length])
    return digest.hexdigest()
