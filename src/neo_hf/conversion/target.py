"""What a conversion writes: a folder that is complete or absent, and the parts of a Hub repository."""

from ..configuration_neo import RELEASED_TOKEN_IDS, NeoConfig
from ..files import read_json
from ..loading import default_image_processor
from ..modeling_neo import NeoForConditionalGeneration
from ..processing_neo import NeoProcessor
from ..tokenization import add_neo_tokens, load_tokenizer
from .source import raise_all
from .weights import TensorInfo, open_checkpoint, write_shards

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PACKAGE = Path(__file__).parents[1]
# In place of config.json, without which transformers would assume the default configuration.
UNFINISHED = "This folder is not complete: the process that writes or removes it is running, or was killed.\n"


def shipped_files() -> list[Path]:
    """The code files that every repository on the Hub holds, so that it works without this package."""
    return sorted(PACKAGE.glob("*_neo.py"))


@contextlib.contextmanager
def new_folder(path: str | Path, force: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """
    A folder to fill, renamed to `path` once it is complete: whenever the process is killed, `path` is as before or
    complete. It starts with a `config.json` that no loader accepts; write the real one last. What an earlier, killed
    process left behind is removed.

    Args:
        path: The final folder.
        force: Replace the folder if it exists.
        sources: Folders that it is made from, which must not be replaced.

    Raises:
        ValueError: `path` exists and `force` is false, is not a folder, or holds a source; or another process is
            writing it.
    """
    path = Path(path).resolve()
    for source in sources:
        if path.exists() and source.resolve().is_relative_to(path):
            raise ValueError(f"{path} exists and would replace its own source {source}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, replaced = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.replaced")
    with _lock(path):
        _recover(path, replaced)
        if path.exists() and not force:
            raise ValueError(f"{path} exists; force=True replaces it.")
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is not a folder.")
        _remove(unfinished)
        unfinished.mkdir()
        (unfinished / "config.json").write_text(UNFINISHED)
        try:
            yield unfinished
            _publish(unfinished, path, replaced)
        finally:
            _recover(path, replaced)
            _remove(unfinished)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`. The system releases it when the process ends, however it ends."""
    file = path.with_name(f".{path.name}.lock")
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"Another process is writing {path}: it holds {file}.") from error
            # The process before may have removed the file between opening and locking: then this lock is void.
            if not (file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())):
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _publish(unfinished: Path, path: Path, replaced: Path):
    """Give the finished folder its name. What it replaces is left at `unfinished` or `replaced`."""
    if path.exists() and not _exchange(unfinished, path):
        path.rename(replaced)
    if not path.exists():
        unfinished.rename(path)


def _recover(path: Path, replaced: Path):
    """Finish or undo what `_publish` began before it was interrupted."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    _remove(replaced)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step. False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        renameat2(at_working_directory, os.fsencode(first), at_working_directory, os.fsencode(second), exchange) == 0
    )


def _remove(folder: Path):
    """
    Remove a folder if it exists. `config.json` is invalidated first and removed last, so that an interrupted removal
    never leaves a folder that loads.
    """
    if not folder.is_dir():
        return
    config = folder / "config.json"
    with contextlib.suppress(OSError):  # a full disk
        spoilt = folder / ".config.json"  # a new file: the old one may be a link
        spoilt.write_text(UNFINISHED)
        spoilt.replace(config)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry != config:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


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
    """Write weights, generation configuration and code, then read back the headers."""
    generation_config = read_generation_config(source) or GenerationConfig.from_model_config(config)
    write_weights(folder, infos, read, max_shard_size)
    generation_config.save_pretrained(folder)
    for file in shipped_files():
        shutil.copyfile(file, folder / file.name)
    assert open_checkpoint(folder).infos == dict(infos), "the tensors written differ from those planned"


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation configuration in a folder, or `None` if it has none."""
    file = folder / "generation_config.json"
    if not file.exists():
        return None
    content = read_json(file)
    try:
        return GenerationConfig.from_dict(content)
    except Exception as error:  # transformers' reader checks little
        raise ValueError(f"{file} is not a generation configuration: {type(error).__name__}: {error}") from error


def write_config(folder: Path, config: NeoConfig):
    """Write `config.json`, which makes the folder a model, after everything else; read it back."""
    config.architectures = [NeoForConditionalGeneration.__name__]
    config.save_pretrained(folder)
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
