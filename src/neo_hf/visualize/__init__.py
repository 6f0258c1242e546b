"""
What the model sees of a prompt: its units, the T, H and W indices, the attention mask, and where an answer looks.

`prompt.py` has the numbers, `draw.py` the figures, which need matplotlib (extra `plot`); it is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from neo_hf.visualize.prompt import (
    ImageUnit,
    Prompt,
    TextUnit,
    Unit,
    answer_attention,
    patches_to_image,
    read_prompt,
    with_answer,
)

if TYPE_CHECKING:
    from neo_hf.visualize.draw import (
        check_output,
        plot_attention,
        plot_mask,
        plot_position_ids,
        plot_prompt,
        plot_units,
        save,
    )

__all__ = [
    "ImageUnit",
    "Prompt",
    "TextUnit",
    "Unit",
    "answer_attention",
    "check_output",
    "patches_to_image",
    "plot_attention",
    "plot_mask",
    "plot_position_ids",
    "plot_prompt",
    "plot_units",
    "read_prompt",
    "save",
    "with_answer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from neo_hf.visualize import draw

    return getattr(draw, name)
