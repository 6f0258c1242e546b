"""Folders in Hub format: checked and pushed."""

from ..conversion.target import shipped_files
from ..conversion.weights import open_checkpoint
from .model_card import set_model_id

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token

REQUIRED = (
    "README.md",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)


# What a model repository holds, of all that training leaves in a folder.
PUBLISHED = (
    "LICENSE*",
    "*.md",
    "*.png",
    "*.jpg",
    "*.jinja",
    "*.py",
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.json",
)


def published_files(folder: str | Path) -> tuple[dict[str, int], list[str]]:
    """
    The files of a folder that make a model repository, with their sizes in bytes, and the files and folders that do
    not: checkpoints, the state of optimisers, logs, answers to held-out data.
    """
    entries = sorted(Path(folder).iterdir())
    published = {
        file.name: file.stat().st_size
        for file in entries
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in PUBLISHED)
    }
    return published, [file.name + "/" * file.is_dir() for file in entries if file.name not in published]


def check_complete(folder: str | Path) -> dict[str, int]:
    """
    The files that would be published, with their sizes in bytes.

    Raises:
        ValueError: Lists the files that are missing, or says what is wrong with the weights.
    """
    folder = Path(folder)
    required = [*REQUIRED, *(file.name for file in shipped_files())]
    missing = [name for name in required if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is incomplete, it lacks {', '.join(missing)}.")
    open_checkpoint(folder)
    return published_files(folder)[0]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Publish the files of a complete folder that make a model repository. An interrupted upload resumes when it is
    started again. The examples in the folder's card are changed to load `repo_id`.

    Args:
        folder: Folder in Hub format.
        repo_id: "user/name"; created if it does not exist.
        private: Make a new repository private.
        revision: Branch to push to; created if it does not exist.
        create_pr: Open a pull request instead.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: The folder is incomplete, or the Hub refused or could not be reached.
    """
    files = check_complete(folder)
    if get_token() is None:
        raise ValueError("There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.")
    _point_card_at(Path(folder) / "README.md", repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files), revision=revision, create_pr=create_pr
        )
    except Exception as error:  # refusals, and whatever the HTTP library raises without a network
        raise ValueError(f"Publishing to {repo_id} failed: {error}") from error
    return commit.pr_url or commit.commit_url


def _point_card_at(file: Path, repo_id: str):
    card = file.read_text(encoding="utf-8")
    changed = set_model_id(card, repo_id)
    if changed != card:
        unfinished = file.with_name(f".{file.name}.unfinished")
        unfinished.write_text(changed, encoding="utf-8")
        unfinished.replace(file)
