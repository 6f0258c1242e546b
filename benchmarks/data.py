"""
Training data: what it costs to start, to resume, and to encode images.

    python benchmarks/data.py [--records 1000000 100000000] [--seconds 10]

Start and resume, each in a process of its own: the time from the data's path to the first sample, and how much memory
that takes; then the same from the state after a million records. The records are short texts in Parquet files of
100,000 and row groups of 10,000. All files are links to one, so that 100 million records do not need 100 times the
disk.

Images: samples per second of CPU time, from JPEG bytes to uint8 and to float32 patches, relative to decoding the JPEG
alone. They are crops of photographs, enlarged. Those of 1,000 x 1,000 pixels are resized, to multiples of 32; the
others have such sides. The state that comes along with each batch is timed with a packing buffer full of images of
1,024 x 1,024.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from neo_hf import load_nano
from neo_hf.loading import NANO, load_processor
from neo_hf.training import PackedDataset, SampleStream, Source, encode_record
from neo_hf.training.packing import BUFFER_BYTES, count_bytes
from neo_hf.training.sources import SourceReader
from neo_hf.training.streams import _to_bytes

RECORDS_PER_FILE = 100_000
SEEN = 1_000_000


def write_files(folder: Path, number: int):
    import datasets

    table = datasets.Dataset.from_dict({"text": [f"Record {i} of the file." for i in range(RECORDS_PER_FILE)]})
    table.to_parquet(folder / "0.parquet", batch_size=10_000)
    for index in range(1, number // RECORDS_PER_FILE):
        os.link(folder / "0.parquet", folder / f"{index}.parquet")


def megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure_start(folder: str, state: str):
    """In a process of its own: to the first sample, or to the first one after a state."""
    processor = load_processor(NANO)
    encode_record({"text": "Hi"}, processor)
    before, start = megabytes(), time.perf_counter()
    stream = SampleStream([Source(folder, name="bench")], processor)
    if state:
        stream.load_state_dict(json.loads(Path(state).read_text()))
    sample = next(iter(stream))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": megabytes() - before, "name": sample["name"]}))


def state_after(folder: str, number: int) -> dict:
    """The state of a stream after so many records, which are read but not encoded."""
    source = Source(folder, name="bench")
    reader = SourceReader(source, None)
    records = (handle for handle in reader.handles() if handle is not None)
    for _ in islice(records, number):
        pass
    state = SampleStream([source], None).initial_state(0, 1)
    return {**state, "samples": number, "readers": [reader.state]}


def run(folder: Path, state: Path | None) -> dict:
    command = [sys.executable, __file__, "--measure", str(folder), *([str(state)] if state else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare_starts(numbers: list[int]):
    print("| records | start | memory | resume after 1,000,000 | memory |")
    print("| --- | --- | --- | --- | --- |")
    for number in numbers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "data")
            folder.mkdir()
            write_files(folder, number)
            started = run(folder, None)
            state = Path(name, "state.json")
            state.write_text(json.dumps(state_after(str(folder), SEEN)))
            resumed = run(folder, state)
        cells = [f"{one['seconds']:.2f} s | {one['megabytes']:.0f} MB" for one in (started, resumed)]
        print(f"| {number:,} | {' | '.join(cells)} |", flush=True)


def jpeg(side: int) -> bytes:
    from sklearn.datasets import load_sample_images

    photograph = Image.fromarray(load_sample_images().images[0])
    file = io.BytesIO()
    photograph.crop((0, 0, 420, 420)).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def rate(function, seconds: float) -> float:
    function()
    count, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < seconds:
        function()
        count += 1
    return count / elapsed


def compare_images(processor, seconds: float):
    print("\n| JPEG | decoding alone | to uint8 patches | to float32 patches | bytes of a sample, uint8 / float32 |")
    print("| --- | --- | --- | --- | --- |")
    for side in (512, 1000, 1024, 2048):
        data = jpeg(side)
        record = {"image": data, "caption": "A temple."}
        decoding = rate(lambda data=data: Image.open(io.BytesIO(data)).convert("RGB").load(), seconds)
        rates = [
            rate(lambda record=record, n=n: encode_record(record, processor, normalize=n), seconds)
            for n in (False, True)
        ]
        sizes = [count_bytes(encode_record(record, processor, normalize=n)) / 1e6 for n in (False, True)]
        print(
            f"| {side:,} x {side:,} | {decoding:.1f} per s | {rates[0]:.1f} per s ({rates[0] / decoding:.2f}) | "
            f"{rates[1]:.1f} per s ({rates[1] / decoding:.2f}) | {sizes[0]:.1f} / {sizes[1]:.1f} MB |",
            flush=True,
        )


def time_state(processor):
    record = {"image": jpeg(1024), "caption": "A temple."}
    packed = PackedDataset(SampleStream([Source([record])], processor), max_length=16384)
    rows = iter(packed)
    start = time.perf_counter()
    row = next(rows)
    filling = time.perf_counter() - start
    encoded = len(row) + len(packed.state_dict()["buffer"])
    start = time.perf_counter()
    size = len(_to_bytes(packed.state_dict()))
    seconds = time.perf_counter() - start
    per_sample = filling / encoded
    print(
        f"\nThe state with a buffer of {BUFFER_BYTES / 1e6:.0f} MB ({size / 1e6:.0f} MB after the first row) takes "
        f"{1000 * seconds:.0f} ms per batch, {seconds / (len(row) * per_sample):.1%} of the time to encode a row of "
        f"{len(row)} images."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000_000, 100_000_000])
    parser.add_argument("--seconds", type=float, default=10, help="per figure of the images")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        folder, *state = arguments.measure
        return measure_start(folder, "".join(state))
    processor = load_nano()[1]
    processor.image_processor.max_pixels = 16777216
    processor.image_processor.patch_size = 16
    compare_images(processor, arguments.seconds)
    time_state(processor)
    compare_starts(arguments.records)


if __name__ == "__main__":
    main()
