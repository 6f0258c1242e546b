"""
Requests per second and time to first token of vLLM, compared with `transformers serve`, over HTTP on this machine.

    python benchmarks/serving.py --vllm-python .venv-vllm/bin/python [--model FOLDER] [--concurrency 1 8 32 128]

Both servers run NEO-nano unless `--model` is given, one after the other, and answer the same streamed requests: a
question, and a question about an image, each one of four. Each concurrency first warms up, then sends at least
`--requests` requests. A request that fails counts as an error and not as a request. The last column is a server's rate
over that of `transformers serve`.
"""

import argparse
import asyncio
import base64
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import AsyncOpenAI, OpenAIError

from neo_hf.loading import EXAMPLE_IMAGE, NANO, load_model_and_processor

QUESTIONS = ["What is this?", "What colour is the circle?", "How many shapes are there?", "Describe the picture."]
NEW_TOKENS = 16


@contextlib.contextmanager
def serve(command: list, environment: dict) -> Iterator[str]:
    """Address of the server that the command starts; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port)], stdout=log, stderr=log, env=os.environ | environment
        )
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode(errors="replace")[-5000:])
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def requests(with_image: bool) -> list[list[dict]]:
    url = "data:image/png;base64," + base64.b64encode(EXAMPLE_IMAGE.read_bytes()).decode()
    image = [{"type": "image_url", "image_url": {"url": url}}] if with_image else []
    return [[{"role": "user", "content": [*image, {"type": "text", "text": question}]}] for question in QUESTIONS]


async def measure(address: str, model: str, with_image: bool, concurrency: int, count: int):
    """(requests per second, median seconds to the first token, errors)"""
    client = AsyncOpenAI(base_url=address, api_key="none", timeout=600, max_retries=0)
    messages, first_tokens, errors = requests(with_image), [], 0
    numbers = iter(range(count))

    async def worker(record: bool, numbers):
        nonlocal errors
        for number in numbers:
            start = time.perf_counter()
            try:
                stream = await client.chat.completions.create(
                    model=model,
                    messages=messages[number % len(messages)],
                    max_tokens=NEW_TOKENS,
                    temperature=0,
                    stream=True,
                )
                first = None
                async for chunk in stream:
                    if first is None and chunk.choices and chunk.choices[0].delta.content:
                        first = time.perf_counter() - start
                if record:
                    first_tokens.append(first or time.perf_counter() - start)
            except OpenAIError:
                errors += record

    await asyncio.gather(*(worker(False, [number]) for number in range(min(concurrency, 4))))
    start = time.perf_counter()
    await asyncio.gather(*(worker(True, numbers) for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    await client.close()
    return len(first_tokens) / seconds, statistics.median(first_tokens or [float("nan")]), errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="Python of the environment with vLLM and neo-hf")
    parser.add_argument("--model", default=str(NANO))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--requests", type=int, default=128)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        for part in load_model_and_processor(arguments.model):
            part.save_pretrained(folder)  # with the code that `transformers serve` loads
        results = compare(folder, arguments)

    print("| requests | at once | server | requests/s | first token | errors | ratio |\n" + "| --- " * 7 + "|")
    for server, kind, concurrency in sorted(results, key=lambda key: (key[1], key[2], key[0])):
        rate, first, errors = results[server, kind, concurrency]
        ratio = rate / results["transformers serve", kind, concurrency][0]
        print(f"| {kind} | {concurrency} | {server} | {rate:.1f} | {first * 1000:.0f} ms | {errors} | {ratio:.2f} |")


def compare(model: str, arguments) -> dict[tuple, tuple]:
    """What `measure` gives for each server, kind of request and concurrency."""
    transformers = Path(sys.executable).with_name("transformers")
    servers = {
        "transformers serve": ([transformers, "serve", model, "--device", "cpu", "--trust-remote-code"], {}),
        # The CPU build of vLLM has no `vllm serve`.
        "vLLM": (
            [
                arguments.vllm_python,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                model,
                "--dtype",
                "float32",
            ],
            {"VLLM_CPU_KVCACHE_SPACE": "1"},
        ),
    }
    results: dict = {}
    for server, (command, environment) in servers.items():
        with serve(command, {"HF_HUB_OFFLINE": "1", **environment}) as address:
            for with_image in (False, True):
                for concurrency in arguments.concurrency:
                    count = max(arguments.requests, concurrency)
                    case = "image" if with_image else "text", concurrency
                    results[server, *case] = asyncio.run(measure(address, model, with_image, concurrency, count))
                    print(server, *case, *results[server, *case], file=sys.stderr)

    return results


if __name__ == "__main__":
    main()
