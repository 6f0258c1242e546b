"""Checkpoints on disk, read and written tensor by tensor: peak memory is independent of the model's size."""

from ..files import read_json, read_text, require_file
from .pickles import ZERO_CLASSES, MetadataUnpickler, TensorStorageMetadata, load_tensors

import hashlib
import io
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} is not a shard index: weight_map must give the file of each tensor.")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
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
        require_file(file)
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
                described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
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
        require_file(file)
        tensors = load_tensors(file)
        if not isinstance(tensors, Mapping):
            raise ValueError(f"{file} must hold tensors by name, got a {type(tensors).__name__}.")
        other = [
            str(name)
            for name, value in tensors.items()
            if not (isinstance(name, str) and isinstance(value, torch.Tensor))
        ]
        if other:
            raise ValueError(f"{file} holds more than plain tensors: {', '.join(other)}.")
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
                raise ValueError(
                    f"{file} holds {name} as {tensor.layout}, {tensor.dtype}, on {tensor.device}; supported are "
                    f"strided tensors with values, of dtype {', '.join(sorted(map(str, DTYPE_NAMES)))}."
                )
        _compare_with_index(file, set(tensors), expected, checkpoint.infos)
        checkpoint.infos |= {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        checkpoint.readers |= {name: partial(tensors.__getitem__, name) for name in tensors}
    return checkpoint


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor, at `offsets`, stored as `length` bytes of a file from `start`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def _open_distributed(folder: Path) -> Checkpoint:
    metadata = folder / ".metadata"
    require_file(metadata)
    try:
        with metadata.open("rb") as file:
            state = MetadataUnpickler(file).load().state
        stored = {
            (key.state["fqn"], tuple(key.state["offset"])): info.state
            for key, info in state["storage_data"].items()
            if key.state.get("offset") is not None
        }
        chunks, infos = {}, {}
        for name, entry in state["state_dict_metadata"].items():
            if isinstance(entry, TensorStorageMetadata):
                dtype = entry.state["properties"].state[0]
                infos[name] = TensorInfo(tuple(map(index, entry.state["size"])), dtype)
                chunks[name] = [_chunk(folder, chunk.state, stored, name) for chunk in entry.state["chunks"]]
    except Exception as error:  # whatever the broken part causes
        raise ValueError(f"{metadata} cannot be read: {type(error).__name__}: {error}") from error
    files = {file: file.stat().st_size for file in sorted(folder.glob("*.distcp")) if file.is_file()}
    for name, parts in chunks.items():
        if unknown := [part.file for part in parts if part.file not in files]:
            raise ValueError(f"{metadata} names {unknown[0].name} for {name}, which is missing.")
        if short := [part.file for part in parts if part.start + part.length > files[part.file]]:
            raise ValueError(f"{short[0]} is truncated: {name} ends behind the end of the file.")
        if sum(torch.Size(part.sizes).numel() for part in parts) != torch.Size(infos[name].shape).numel():
            raise ValueError(f"{metadata} does not give all parts of {name}.")

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(infos[name].shape, dtype=infos[name].dtype)
        for part in chunks[name]:
            with part.file.open("rb") as file:
                file.seek(part.start)
                found = load_tensors(part.file, io.BytesIO(file.read(part.length)))
            block = tensor[tuple(slice(o, o + size) for o, size in zip(part.offsets, part.sizes, strict=True))]
            if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (block.shape, block.dtype):
                raise ValueError(f"{part.file} does not hold {name} as {metadata} describes it.")
            block.copy_(found)
        return tensor

    return Checkpoint(infos, {name: partial(read, name) for name in infos}, [*files])


def _chunk(folder: Path, chunk: dict[str, Any], stored: Mapping[tuple, dict[str, Any]], name: str) -> _Chunk:
    offsets = tuple(map(index, chunk["offsets"]))
    info = stored[name, offsets]
    if info.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed with {info['transform_descriptors']}, which is not supported")
    start, length = index(info["offset"]), index(info["length"])
    if min(start, length, *offsets) < 0:
        raise ValueError(f"the position of {name} is negative")
    return _Chunk(offsets, tuple(map(index, chunk["sizes"])), folder / info["relative_path"], start, length)


def _open_zero(folder: Path) -> Checkpoint:
    """
    The float32 weights in the states of DeepSpeed's ZeRO optimizer, stages 1 to 3.

    Stages 1 and 2 flatten each group of parameters and cut it into one part per process. Stage 3 cuts each parameter,
    padded to a multiple of the number of processes, and each process flattens its parts.
    """
    step = folder / read_text(folder / "latest").strip()
    if step.parent != folder or not step.is_dir():
        raise ValueError(f"{folder / 'latest'} names {step.name!r}, which is not a folder next to it.")
    by_rank = {
        kind: sorted(step.glob(f"*_{kind}_states.pt"), key=lambda file: [*map(int, re.findall(r"\d+", file.name))])
        for kind in ("model", "optim")
    }
    if not all(by_rank.values()):
        raise ValueError(f"{step} must hold *_model_states.pt and *_optim_states.pt of ZeRO stage 1, 2 or 3.")
    for file in (*by_rank["model"], *by_rank["optim"]):
        require_file(file)
    models = [load_tensors(file, classes=ZERO_CLASSES) for file in by_rank["model"]]
    loaded = [load_tensors(file, classes=ZERO_CLASSES) for file in by_rank["optim"]]
    try:
        tensors = _merge_zero(models, [state["optimizer_state_dict"] for state in loaded])
        infos = {name: TensorInfo(tuple(pieces.shape), torch.float32) for name, pieces in tensors.items()}
    except Exception as error:  # whatever the broken part causes
        raise ValueError(f"{step} is not a complete ZeRO checkpoint: {type(error).__name__}: {error}") from error
    readers = {name: pieces.read for name, pieces in tensors.items()}
    return Checkpoint(infos, readers, sorted(step.glob("*.pt")))


@dataclass(frozen=True)
class _Pieces:
    """A tensor as consecutive pieces of flat tensors, padded at its end."""

    shape: torch.Size
    pieces: list[torch.Tensor]

    def __post_init__(self):
        if sum(piece.numel() for piece in self.pieces) < self.shape.numel():
            raise ValueError(f"{self.shape.numel()} values are expected where fewer are stored")

    def read(self) -> torch.Tensor:
        flat = torch.cat([piece.flatten() for piece in self.pieces])
        return flat[: self.shape.numel()].view(self.shape).float()


def _cut(parts: list[torch.Tensor], start: int, length: int) -> list[torch.Tensor]:
    """The values from `start` to `start + length` of flat tensors that follow one another."""
    pieces = []
    for part in parts:
        first, last = max(start, 0), min(start + length, part.numel())
        if first < last:
            pieces.append(part[first:last])
        start -= part.numel()
    return pieces


def _merge_zero(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> dict[str, _Pieces]:
    stage, world, model = optimizers[0]["zero_stage"], optimizers[0]["partition_count"], models[0]
    world = max(world) if isinstance(world, list) else world
    if world != len(optimizers):
        raise ValueError(f"it was written by {world} processes, but has {len(optimizers)} *_optim_states.pt")
    if stage not in (1, 2, 3):
        raise ValueError(f"ZeRO stage must be 1, 2 or 3, got {stage!r}")
    tensors = {
        name: _Pieces(buffer.shape, [buffer])
        for name, buffer in model["module"].items()
        if name in model["buffer_names"]
    }
    for name, shape in (model.get("frozen_param_shapes") or {}).items():
        holders = models if stage == 3 else [model]
        tensors[name] = _Pieces(torch.Size(shape), [holder["frozen_param_fragments"][name] for holder in holders])
    if stage == 3:
        ranks = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
        offset = 0
        for name, shape in (entry for group in model["param_shapes"] for entry in group.items()):
            length = -(-torch.Size(shape).numel() // world)
            pieces = [piece for parts in ranks for piece in _cut(parts, offset, length)]
            tensors[name] = _Pieces(torch.Size(shape), pieces)
            offset += length
        if any(sum(part.numel() for part in parts) != offset for parts in ranks):
            raise ValueError("its parameters do not have the sizes that it lists")
    else:
        paddings = optimizers[0].get("param_alignment_paddings")
        for number, group in enumerate(model["param_shapes"]):
            parts = [optimizer["single_partition_of_fp32_groups"][number] for optimizer in optimizers]
            offset = 0
            for position, (name, shape) in enumerate(group.items()):
                length = torch.Size(shape).numel()
                tensors[name] = _Pieces(torch.Size(shape), _cut(parts, offset, length))
                offset += length + (paddings[number][position] if paddings else 0)
            stored, alignment = sum(part.numel() for part in parts), 2 * world
            if -(-stored // alignment) != -(-offset // alignment):  # the end is padded, by less than this
                raise ValueError(f"group {number} holds {stored} values, expected {offset}")
    for name, other in model["shared_params"].items():
        if other in tensors:
            tensors[name] = tensors[other]
    return tensors


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
