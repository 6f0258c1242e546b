"""Write the cards of the released checkpoints next to this file: python model_cards/generate.py"""

from pathlib import Path

from neo_hf.publishing.model_card import load_release, released_config, render_model_card


def render_released_cards() -> dict[str, str]:
    """The card of each released checkpoint, by file name."""
    return {
        f"{Path(checkpoint).name}.md": str(render_model_card(released_config(checkpoint), checkpoint, checkpoint))
        for checkpoint in load_release()["checkpoints"]
    }


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, card in render_released_cards().items():
        unfinished = folder / f".{name}.tmp"
        unfinished.write_text(card, encoding="utf-8")
        unfinished.replace(folder / name)
