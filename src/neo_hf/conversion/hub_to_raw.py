"""A NEO in Hub format to the raw layout."""

from ..raw import neo_config_to_raw, neo_to_raw_name, raw_to_neo_name
from ..tokenization import load_tokenizer
from .source import match_names, read_config, resolve
from .target import new_folder, write_weights
from .weights import open_checkpoint

import json
import shutil
from pathlib import Path

import torch


def convert_hub_to_raw(
    hub: str | Path, out: str | Path, *, max_shard_size: int | str = "5GB", force: bool = False
) -> None:
    """
    Write a NEO in the layout of the released checkpoints, for programs that read only that one.

    Args:
        hub: Folder in Hub format, or Hub id.
        out: Folder to create.
        max_shard_size: Maximum size of a weight file, in bytes or as a string such as "5GB".
        force: Replace `out` if it exists.

    Raises:
        ValueError: As for `convert_raw_to_hub`, or the raw layout cannot express the configuration.
    """
    source = resolve(hub)
    config = read_config(source)
    checkpoint = open_checkpoint(source)
    source_names = match_names(checkpoint, config)
    infos = {neo_to_raw_name(name): checkpoint.infos[old] for name, old in source_names.items()}
    config.dtype = infos["language_model.model.norm.weight"].dtype
    raw_config = neo_config_to_raw(config)
    tokenizer = load_tokenizer(source)

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(source_names[raw_to_neo_name(name)])

    with new_folder(out, force, [source]) as folder:
        write_weights(folder, infos, read, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if (source / "generation_config.json").exists():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
        (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
