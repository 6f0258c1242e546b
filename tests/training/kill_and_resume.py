"""
Kill a training run at random and resume it: losses, weights and rows are those of a run that was never killed.

    python tests/training/kill_and_resume.py OUT [--kills 10] [--steps 28] [--workers 2]

It trains a tiny model on packed rows of text and images, with a checkpoint every second step. Each process is killed
with SIGKILL at a random moment after its first step, and the same command is run again, until there were so many
kills; the last process ends by itself. No record may be encoded by a process that continues from a checkpoint which
already has it, in a row that was trained on or waiting to be packed.
"""

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

SAVE_STEPS = 2


def train(folder: Path, steps: int, workers: int):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers import random_model, tiny_config
    from PIL import Image
    from torch.utils.data import get_worker_info
    from transformers import TrainerCallback, TrainingArguments

    from neo_hf import NeoImageProcessor, NeoProcessor
    from neo_hf.tokenization import load_qwen_package_tokenizer
    from neo_hf.training import NeoTrainer, PackedCollator, PackedDataset, SampleStream, Source, sources

    torch.set_num_threads(1)  # several threads may add in another order
    text = {"hidden_size": 32, "num_hidden_layers": 2}
    model = random_model(tiny_config(151_936, text_config=text))
    processor = NeoProcessor(NeoImageProcessor(min_pixels=4096, max_pixels=16384), load_qwen_package_tokenizer())
    images = [Image.effect_noise((64 + 32 * (i % 3), 64), 64).convert("RGB") for i in range(5)]
    pairs = [
        {
            "image": images[i % 5],
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes " * i}],
        }
        for i in range(1, 30)
    ]
    chats = [[{"text": f"{i} " * (1 + i % 9)}, {"text": f"{i}"}] if i % 4 else {"bad": i} for i in range(200)]

    encode = sources.encode_record

    def logged_encode(*args, **kwargs):
        sample = encode(*args, **kwargs)
        worker = get_worker_info()
        reader, _ = (worker.dataset if worker else rows).state_dict()["reader"]
        main_process = os.getppid() if worker else os.getpid()
        with open(folder / f"encoded-{main_process}-{reader}.txt", "a") as file:
            file.write(sample["name"] + "\n")
        return sample

    sources.encode_record = logged_encode
    stream = SampleStream([Source(pairs, name="pairs"), Source(chats, name="chats", shuffle_buffer=16)], processor)
    rows = PackedDataset(stream, max_length=192, buffer_size=8)
    collator = PackedCollator(processor.tokenizer.pad_token_id, max_length=192)

    class SayStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            print("STEP", state.global_step, flush=True)

    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=SAVE_STEPS,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = NeoTrainer(
        model, arguments, data_collator=collator, train_dataset=rows, processing_class=processor, callbacks=[SayStep()]
    )
    checkpoint = last_checkpoint(folder)
    print("FROM", checkpoint and checkpoint.name, os.getpid(), flush=True)
    trainer.train(str(checkpoint) if checkpoint else None)
    trainer.save_model()
    trainer.save_state()


def last_checkpoint(folder: Path) -> Path | None:
    """The last one whose trainer_state.json, which is written last, can be read."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (OSError, ValueError):
            continue
    return None


def launch(folder: Path, steps: int, workers: int) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(folder), "--steps", str(steps), "--workers", str(workers), "--train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=open(folder / "stderr.txt", "a"), text=True, env=environment
    )


def kill_at_random(folder: Path, kills: int, steps: int, workers: int, seed: int = 0) -> list[tuple[str, int]]:
    """Returns from which checkpoint each process started, and its id."""
    draw = random.Random(seed)
    starts: list[tuple[str, int]] = []
    for number in range(kills + 1):
        process = launch(folder, steps, workers)
        assert process.stdout is not None
        target = draw.randint(1, 2 * SAVE_STEPS)
        for line in process.stdout:
            if line.startswith("FROM"):
                _, checkpoint, pid = line.split()
                starts.append((checkpoint, int(pid)))
            if line.startswith("STEP"):
                target -= 1
                if number < kills and target == 0:
                    time.sleep(draw.random() * 0.2)
                    os.kill(process.pid, signal.SIGKILL)
                    break
        process.stdout.close()
        process.wait()
        if process.returncode == 0:
            return starts
        assert process.returncode == -signal.SIGKILL, (folder / "stderr.txt").read_text()[-4000:]
    raise AssertionError("the last process did not end")


def compare(whole: Path, killed: Path):
    states = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, killed)]
    losses = [[entry["loss"] for entry in state if "loss" in entry] for state in states]
    assert losses[0] == losses[1], losses
    weights = [load_file(folder / "model.safetensors") for folder in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def compare_encodings(whole: Path, killed: Path, starts: list[tuple[str, int]], workers: int):
    """
    What each process encoded are the samples that follow its checkpoint: nothing in it again, and nothing left out.
    """
    for checkpoint, process in starts:
        state = whole / "nothing"
        if checkpoint != "None":
            state = killed / checkpoint / "stream_state_0.pt"
        for reader in range(max(workers, 1)):
            num_seen = 0
            if state.exists():
                saved = torch.load(state, weights_only=True)["workers"][reader]
                num_seen = torch.load(io.BytesIO(saved.numpy().tobytes()), weights_only=True)["samples"]
            [path] = whole.glob(f"encoded-*-{reader}.txt")
            expected = path.read_text().splitlines()[num_seen:]
            log = killed / f"encoded-{process}-{reader}.txt"
            found = log.read_text().splitlines() if log.exists() else []
            count = min(len(found), len(expected))  # one may have read further ahead at its end
            assert found[:count] == expected[:count], (checkpoint, reader, num_seen)
            if checkpoint == starts[-1][0]:
                assert count, "the last process encoded nothing"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        return train(arguments.out, arguments.steps, arguments.workers)
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    run = launch(whole, arguments.steps, arguments.workers)
    run.communicate()
    assert run.returncode == 0, (whole / "stderr.txt").read_text()[-4000:]
    starts = kill_at_random(killed, arguments.kills, arguments.steps, arguments.workers)
    compare(whole, killed)
    compare_encodings(whole, killed, starts, arguments.workers)
    print(f"{len(starts) - 1} kills, resumed from {[checkpoint for checkpoint, _ in starts]}: equal to the bit.")


if __name__ == "__main__":
    main()
