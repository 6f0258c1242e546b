"""No code in a checkpoint runs, whatever file it is in. A payload would leave a canary; its file is named."""

import builtins
import collections
import functools
import json
import os
import pickle
import posix
import shutil
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import GOLDEN
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from neo_hf import NeoConfig, NeoForConditionalGeneration
from neo_hf.conversion import convert_raw_to_hub, init_from_qwen3, source
from neo_hf.conversion.weights import open_checkpoint
from neo_hf.loading import load_model_and_processor
from neo_hf_cli import main

RAW = GOLDEN / "neo_tiny" / "raw"
QWEN3 = GOLDEN / "qwen3_init" / "qwen3"
NORM = "language_model.model.norm.weight"


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class State:
    """Pickled as an object whose state holds a call."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return (collections.OrderedDict, (), {"call": self.call})


PAYLOADS = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "posix.system": lambda canary: Call(posix.system, f"touch {canary}"),
    "eval": lambda canary: Call(builtins.eval, f"open({canary!r}, 'w')"),
    "exec": lambda canary: Call(builtins.exec, f"open({canary!r}, 'w')"),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", canary]),
    "open": lambda canary: Call(open, canary, "w"),
    "an argument": lambda canary: Call(torch.Size, [Call(os.system, f"touch {canary}")]),
    "torch.load": lambda canary: Call(functools.partial(torch.load, weights_only=False), f"{canary}.pickle"),
    "in a state": lambda canary: State(Call(os.system, f"touch {canary}")),
    "in a path": lambda canary: StorageMeta(checkpoint_id=Call(os.system, f"touch {canary}")),
}


def save_distributed(folder):
    (folder / "model.safetensors").rename(folder.parent / "tensors.safetensors")
    tensors = load_file(folder.parent / "tensors.safetensors")
    (folder.parent / "tensors.safetensors").unlink()
    dcp.save({"model": tensors, "step": 3}, checkpoint_id=folder, no_dist=True)


def metadata_with(folder, value):
    save_distributed(folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"model": value}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def metadata_is(folder, value):
    save_distributed(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(value))


def shard_with(folder, value):
    """The bytes of one tensor replaced by a pickle."""
    save_distributed(folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (info,) = (info for key, info in metadata.storage_data.items() if key.fqn == f"model.{NORM}")
    torch.save(value, folder / "evil.distcp")
    info.relative_path, info.offset, info.length = "evil.distcp", 0, (folder / "evil.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def zero_with(kind):
    def make(folder, value):
        (folder / "model.safetensors").unlink()
        (folder / "latest").write_text("global_step1")
        (folder / "global_step1").mkdir()
        plain = {"module": {}, "buffer_names": [], "param_shapes": [], "shared_params": {}}
        for name in ("model", "optim"):
            content = plain | {"extra": value} if name == kind else plain
            torch.save(content, folder / "global_step1" / f"zero_pp_rank_0_mp_rank_00_{name}_states.pt")

    return make


def bin_with(folder, value, **kwargs):
    (folder / "model.safetensors").unlink()
    torch.save({NORM: value}, folder / "pytorch_model.bin", **kwargs)


PLACES = {
    ".metadata": metadata_is,
    "planner data": metadata_with,
    ".distcp": shard_with,
    "model_states.pt": zero_with("model"),
    "optim_states.pt": zero_with("optim"),
    "pytorch_model.bin": bin_with,
    "legacy pytorch_model.bin": lambda folder, value: bin_with(folder, value, _use_new_zipfile_serialization=False),
    "bare pickle": lambda folder, value: (
        (folder / "model.safetensors").unlink(),
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(value)),
    ),
}


@pytest.fixture
def raw(tmp_path):
    shutil.copytree(RAW, tmp_path / "raw")
    return tmp_path / "raw"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_code_runs(raw, tmp_path, place, payload):
    canary = tmp_path / "canary"
    (tmp_path / "canary.pickle").write_bytes(pickle.dumps(Call(os.system, f"touch {canary}")))
    PLACES[place](raw, PAYLOADS[payload](str(canary)))
    assert not canary.exists()
    with pytest.raises(ValueError, match=r"raw/.*cannot be read"):
        convert_raw_to_hub(raw, tmp_path / "hub")
    assert not canary.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary.pickle", "raw"]


def test_classes_of_the_metadata_cannot_be_changed(raw, tmp_path):
    """The pickle's BUILD on a class sets attributes of it: of stand-ins at most, and they refuse."""
    save_distributed(raw)
    attack = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(NX\x07\x00\x00\x00versionK\x05\x86tb."
    (raw / ".metadata").write_bytes(attack)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        open_checkpoint(raw)
    assert not hasattr(BytesStorageMetadata, "version")
    assert getattr(Metadata, "version", None) is None  # torch 2.8 has no such field


def test_distributed_folder(raw, tmp_path):
    expected = load_file(raw / "model.safetensors")
    save_distributed(raw)
    found = open_checkpoint(raw)
    assert found.infos.keys() == {f"model.{name}" for name in expected}  # the step is no tensor
    for name, tensor in expected.items():
        assert torch.equal(found.read(f"model.{name}"), tensor), name
    convert_raw_to_hub(raw, tmp_path / "hub", verify=True)


def change_storage(folder, **change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (info,) = (info for key, info in metadata.storage_data.items() if key.fqn == f"model.{NORM}")
    vars(info).update(change)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change_storage(f, relative_path="../secret.distcp"), r"names secret\.distcp .* missing"),
        (lambda f: change_storage(f, length=10**9), r"__0_0\.distcp is truncated"),
        (lambda f: change_storage(f, offset=-1), "is negative"),
        (lambda f: change_storage(f, transform_descriptors=["zstd"]), "compressed with"),
        (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp .* missing"),
        (lambda f: (f / "__0_0.distcp").write_bytes(b"x" * 10**7), r"__0_0\.distcp cannot be read"),
        (lambda f: (f / ".metadata").write_bytes(b""), r"\.metadata cannot be read"),
    ],
)
def test_broken_distributed_folder(raw, tmp_path, spoil, message):
    save_distributed(raw)
    (tmp_path / "secret.distcp").write_bytes(b"x" * 10**4)
    spoil(raw)
    with pytest.raises(ValueError, match=message):
        convert_raw_to_hub(raw, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def replace_by_folder(file):
    file.unlink(missing_ok=True)
    file.mkdir()


NOT_UTF8 = '{"architectures": "é"}'.encode("latin-1")
NOT_JSON = {"empty": b"", "truncated": b'{"a": [1, ', "not UTF-8": NOT_UTF8, "nested": b"[" * 100_000}
NO_OBJECT = {"list": b"[1, 2]", "null": b"null"}


@pytest.mark.parametrize("content", [*NOT_JSON, *NO_OBJECT, "folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
)
def test_json_files(raw, tmp_path, name, content):
    if content == "folder":
        replace_by_folder(raw / name)
    else:
        (raw / name).write_bytes((NOT_JSON | NO_OBJECT)[content])
    message = "must hold a JSON object, got" if content in NO_OBJECT else "is not (a file|UTF-8|valid JSON)"
    with pytest.raises(ValueError, match=f"{name} {message}"):
        convert_raw_to_hub(raw, tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize("content", NO_OBJECT)
def test_json_files_that_loading_reads(raw, tmp_path, capsys, content):
    """Those that transformers reads without a check, or without their names in errors."""
    shutil.copytree(QWEN3, tmp_path / "qwen3")
    for folder in (raw, tmp_path / "qwen3"):
        (folder / "config.json").write_bytes(NO_OBJECT[content])
    for load in (NeoConfig.from_pretrained, NeoForConditionalGeneration.from_pretrained, load_model_and_processor):
        with pytest.raises(ValueError, match=r"raw/config\.json must hold a JSON object, got"):
            load(raw)
    with pytest.raises(ValueError, match=r"qwen3/config\.json must hold a JSON object, got"):
        init_from_qwen3(tmp_path / "qwen3", tmp_path / "neo", num_pre_buffer_layers=2)
    with pytest.raises(SystemExit):
        main(["info", str(raw)])
    assert "raw/config.json must hold a JSON object, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [*NOT_JSON.values(), *NO_OBJECT.values(), b"{}", b'{"metadata": {}, "weight_map": {"a": ["b"]}}']
)
def test_index_that_loading_reads(raw, content):
    (raw / "model.safetensors").unlink()
    (raw / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(OSError, match=r"raw/model\.safetensors\.index\.json cannot be read: .* weight_map"):
        NeoForConditionalGeneration.from_pretrained(raw)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(64).to_sparse(), "sparse_coo"),
        (torch.ones(64, device="meta"), "on meta"),
        (torch.ones(64, dtype=torch.complex64), "complex64"),
        (torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8), "qint8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_without_plain_values(raw, tmp_path, tensor, message):
    bin_with(raw, tensor)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin holds {NORM} as .*{message}"):
        convert_raw_to_hub(raw, tmp_path / "hub")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, b"PK\x03\x04" + b"x" * 50, None], ids=repr)
def test_weights_that_are_none(raw, tmp_path, name, content):
    (raw / "model.safetensors").unlink()
    if content is None:
        replace_by_folder(raw / name)
    else:
        (raw / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} (cannot be read|is not a file)"):
        convert_raw_to_hub(raw, tmp_path / "hub")


ZERO = ["latest", "global_step1/mp_rank_00_model_states.pt", "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"]


@pytest.mark.parametrize(
    ("files", "downloaded"),
    [
        (["model.safetensors", "pytorch_model.bin", "training_args.bin", "evil.py"], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "pytorch_model-00001-of-00001.bin"],
            ["model.safetensors.index.json", "model-00001-of-00001.safetensors"],
        ),
        (["model.safetensors", *ZERO, "optimizer.pt"], ["model.safetensors"]),
        (["pytorch_model.bin", "scheduler.pt", "rng_state.pth"], ["pytorch_model.bin"]),
        (
            ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"],
            ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"],
        ),
        ([*ZERO, "zero_to_fp32.py"], ZERO),
    ],
)
def test_download_takes_what_is_needed(tmp_path, monkeypatch, files, downloaded):
    common = ["config.json", "tokenizer.json", "README.md"]

    def snapshot_download(repo_id, allow_patterns):
        for name in filter_repo_objects([*files, *common], allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(source, "snapshot_download", snapshot_download)
    monkeypatch.setattr(source, "check_available", lambda name: None)
    assert source.resolve("someone/neo") == tmp_path
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*downloaded, *common}


def test_index_of_many_tensors_in_a_missing_file(raw, tmp_path):
    save_file(load_file(raw / "model.safetensors"), raw / "a.safetensors")
    (raw / "model.safetensors").unlink()
    (raw / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: ["a.safetensors"]}}))
    with pytest.raises(ValueError, match="is not a shard index"):
        convert_raw_to_hub(raw, tmp_path / "hub")
