"""Draw data to fine-tune NEO-nano on: shapes in three colours that it does not know.

    python examples/nano/new_colors.py colors

writes images, `train.jsonl` and `held_out.jsonl` to `colors`, which hold no scene in common.
"""

import itertools
import json
from argparse import ArgumentParser
from pathlib import Path

from world import NEW_COLORS, World


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 400), ("held_out", 60)):
        world = World(seed=0, test=part == "held_out", colors=tuple(NEW_COLORS))
        asked = (s for s in world.stream({"attribute": 1}) if "What color" in s["messages"][0]["content"][1]["text"])
        records = []
        for number, sample in enumerate(itertools.islice(asked, count)):
            (image, question), (answer,) = (message["content"] for message in sample["messages"])
            image["image"].save(folder / f"{part}-{number}.png")
            turns = [("human", f"<image>\n{question['text']}"), ("gpt", answer["text"])]
            conversation = [{"from": role, "value": text} for role, text in turns]
            records.append({"image": f"{part}-{number}.png", "conversations": conversation})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
