"""
Time of `import neo_hf` and of `neo-hf --help`, compared with importing torch and Transformers.

    python benchmarks/startup.py [--repeats 7]

`import transformers` alone loads none of its classes, so there are three baselines: torch with that import; torch with
the Auto classes, which every user of a model imports; torch with a vision-language model of Transformers. Each runs in
its own process, in turn. Times are CPU seconds, which are less sensitive to other load than wall-clock time. Figures
are medians over rounds; ratios are taken within each round.
"""

import argparse
import resource
import statistics
import subprocess
import sys

NEO = "import neo_hf"
COMMANDS = {
    NEO: NEO,
    "torch, transformers": "import torch, transformers",
    "torch, Auto classes": "import torch; from transformers import AutoModelForImageTextToText, AutoProcessor",
    "torch, Qwen3-VL": "import torch; from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor",
    "neo-hf --help": "import neo_hf_cli; neo_hf_cli.main(['--help'])",
}


def cpu_seconds(script: str) -> float:
    def children():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = children()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return children() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    for script in COMMANDS.values():
        cpu_seconds(script)  # compiles to bytecode
    rounds = [{name: cpu_seconds(script) for name, script in COMMANDS.items()} for _ in range(arguments.repeats)]
    print("| | CPU seconds | import neo_hf / this |\n| --- | --- | --- |")
    for name in COMMANDS:
        seconds = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[NEO] / times[name] for times in rounds)
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
