"""
Time and peak memory of converting a raw checkpoint of random bf16 weights, compared with copying its files.

    python benchmarks/conversion.py [--layers 32] [--repeats 3]

The default, 32 layers of NEO-2B's width, is 4 GB. Peak memory excludes what importing neo_hf needs. Copy and
conversion alternate; times are medians.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from neo_hf import NeoConfig
from neo_hf.conversion.source import expected_shapes
from neo_hf.conversion.weights import TensorInfo, write_shards
from neo_hf.raw import neo_config_to_raw, neo_to_raw_name

# The high-water mark of this process only; getrusage() would start from that of the parent.
REPORT = "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
TIME = "import sys, time; import neo_hf.conversion as c; start = time.perf_counter(); "
CONVERT = TIME + "c.convert_raw_to_hub(*sys.argv[1:]); print(time.perf_counter() - start); "


def run(script, *arguments):
    """The last number that a process printed, if any, and its peak resident memory in GB."""
    command = [sys.executable, "-c", script + REPORT, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    *lines, memory = output.strip().splitlines()
    return [*map(float, lines[-1:]), int(memory.split()[1]) * 1024 / 1e9]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    config = NeoConfig(
        text_config={"num_hidden_layers": arguments.layers, "num_pre_buffer_layers": 4}, dtype=torch.bfloat16
    )
    infos = {
        neo_to_raw_name(name): TensorInfo(shape, torch.bfloat16) for name, shape in expected_shapes(config).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "out"
        raw.mkdir()
        write_shards(raw, infos, lambda name: torch.randn(infos[name].shape).to(torch.bfloat16), "2GB")
        (raw / "config.json").write_text(json.dumps(neo_config_to_raw(config)))
        size = sum(file.stat().st_size for file in raw.iterdir()) / 1e9
        imported = run("import neo_hf.conversion; ")[-1]
        times, peaks = {"copy": [], "convert": []}, []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            shutil.copytree(raw, out)
            times["copy"].append(time.perf_counter() - start)
            shutil.rmtree(out)
            elapsed, memory = run(CONVERT, str(raw), str(out))
            times["convert"].append(elapsed)
            peaks.append(memory - imported)
            shutil.rmtree(out)
    copy, convert = (statistics.median(values) for values in times.values())
    print(f"{size:.2f} GB: copy {copy:.1f} s, conversion {convert:.1f} s ({convert / copy:.2f} x)")
    print(f"peak memory {max(peaks):.2f} GB beyond {imported:.2f} GB of the imports")


if __name__ == "__main__":
    main()
