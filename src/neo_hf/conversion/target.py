"""What a conversion writes: a folder that is complete or absent, and the parts of a Hub repository."""

from ..configuration_neo import RELEASED_TOKEN_IDS, NeoConfig
from ..loading import default_image_processor
from ..modeling_neo import NeoForConditionalGeneration
from ..processing_neo import NeoProcessor
from ..tokenization import add_neo_tokens, load_tokenizer
from .source import raise_all
from .weights import TensorInfo, open_checkpoint, write_shards

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig

PACKAGE = Path(__file__).parents[1]


def shipped_files() -> list[Path]:
    """The code files that every repository on the Hub holds, so that it works without this package."""
    return sorted(PACKAGE.glob("*_neo.py"))


@contextlib.contextmanager
def new_folder(path: str | Path, force: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """
    A folder to fill, renamed to `path` once it is complete: whenever the process is killed, `path` is complete or
    absent. What an earlier, killed process left behind is removed.

    Args:
        path: The final folder.
        force: Replace the folder if it exists.
        sources: Folders that it is made from, which must not be replaced.

    Raises:
        ValueError: `path` exists and `force` is false, is not a folder, or holds a source.
    """
    path = Path(path).resolve()
    if path.exists() and not force:
        raise ValueError(f"{path} exists; force=True replaces it.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a folder.")
    for source in sources:
        if source.resolve().is_relative_to(path):
            raise ValueError(f"{path} would replace its own source {source}.")
    unfinished, replaced = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.replaced")
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.exists():
            path.rename(replaced)
        unfinished.rename(path)
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def write_weights(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
):
    """Write weights; refuse tensors with NaN or infinite values, by name."""
    broken = []

    def checked(name: str) -> torch.Tensor:
        tensor = read(name).to(infos[name].dtype)
        # NaN propagates to both extremes. isfinite on every element would take twenty times as long.
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            broken.append(name)
        return tensor

    write_shards(folder, infos, checked, max_shard_size)
    raise_all(broken, "These tensors hold values that are not finite")


def write_model(
    folder: Path,
    config: NeoConfig,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
    source: Path,
):
    """Write weights, configuration, generation configuration and code, then read back what a loader looks at."""
    write_weights(folder, infos, read, max_shard_size)
    generation_config = GenerationConfig.from_model_config(config)
    if (source / "generation_config.json").exists():
        generation_config = GenerationConfig.from_pretrained(source)
    generation_config.save_pretrained(folder)
    config.architectures = [NeoForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    for file in shipped_files():
        shutil.copyfile(file, folder / file.name)
    assert open_checkpoint(folder).infos == dict(infos), "the tensors written differ from those planned"
    assert NeoConfig.from_pretrained(folder).to_diff_dict() == config.to_diff_dict(), "the configuration changed"


def make_processor(folder: str | Path, config: NeoConfig, required: bool) -> NeoProcessor | None:
    """The processor of a tokenizer folder. Sets the ids of image tokens that the configuration does not know."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        if required:
            raise ValueError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt.")
        return None
    add_neo_tokens(tokenizer)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens including NEO's own, but the vocabulary of the model has "
            f"{config.text_config.vocab_size}."
        )
    processor = NeoProcessor(default_image_processor(config), tokenizer)
    for name in RELEASED_TOKEN_IDS:
        known, found = getattr(config, name), getattr(processor, name)
        if known is not None and known != found:
            raise ValueError(f"{name} is {known} in the configuration, but {found} in the tokenizer.")
        setattr(config, name, found)
    return processor


def write_processor(folder: Path, processor: NeoProcessor | None) -> list[str]:
    """Write the processor with its tokenizer and chat template. Returns what is missing if there is none."""
    if processor is None:
        return ["tokenizer", "processor", "chat template"]
    processor.save_pretrained(folder)
    return []
