"""Publishing: model cards, and folders in Hub format pushed to the Hub."""

from .hub import check_complete, published_files, push, shipped_files

__all__ = ["check_complete", "published_files", "push", "shipped_files"]
