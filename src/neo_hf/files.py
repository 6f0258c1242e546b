"""Read files of untrusted checkpoints; errors name the file."""

import json
from pathlib import Path
from typing import Any


def require_file(file: Path):
    """
    Check that a file exists and is not a folder, pipe or device.

    Raises:
        ValueError: It is missing or not a file.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file." if file.exists() else f"{file} is missing.")


def read_text(file: Path) -> str:
    """
    Content of a text file.

    Raises:
        ValueError: It is missing, not a file, or not UTF-8.
    """
    require_file(file)
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """
    Content of a JSON file that holds an object.

    Raises:
        ValueError: As for `read_text`, or it is not JSON or no object.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {content!r:.200}.")
    return content
