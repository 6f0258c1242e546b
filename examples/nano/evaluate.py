"""Accuracy of a NEO on unseen scenes of `world.py`, with its images and with blank ones.

python examples/nano/evaluate.py MODEL --count 1000
"""

import collections
import itertools
import json
from argparse import ArgumentParser

import torch
from PIL import Image
from tqdm import tqdm
from train import TASKS
from world import World

from neo_hf.loading import load_model_and_processor


def blank(sample: dict) -> dict:
    """The sample with every image replaced by a grey one of the same size."""
    messages = [
        message
        | {
            "content": [
                part | {"image": Image.new("RGB", part["image"].size, "gray")} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in sample["messages"]
    ]
    return {"messages": messages}


def answer(model, processor, samples: list[dict]) -> list[str]:
    """Greedy answers to the first question of each sample."""
    inputs = processor.apply_chat_template(
        [sample["messages"][:1] for sample in samples],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=1000, help="unseen samples per task")
    parser.add_argument("--seed", type=int, default=12345)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model_and_processor(args.model, dtype=torch.float32)
    table = {}
    for task in TASKS:
        world = World(args.seed, test=True)
        samples = list(itertools.islice(world.stream({task: 1}), args.count))
        expected = [sample["messages"][1]["content"][0]["text"] for sample in samples]
        correct = collections.Counter()
        for start in tqdm(range(0, args.count, 50), task):
            chunk = slice(start, start + 50)
            blanked = [blank(sample) for sample in samples[chunk]]
            for name, asked in (("accuracy", samples[chunk]), ("blanked", blanked)):
                given = answer(model, processor, asked)
                correct[name] += sum(a == e for a, e in zip(given, expected[chunk], strict=True))
        table[task] = {name: correct[name] / args.count for name in ("accuracy", "blanked")}
        table[task]["majority"] = collections.Counter(expected).most_common(1)[0][1] / args.count
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
