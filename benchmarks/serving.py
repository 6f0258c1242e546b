"""
Requests per second and time to first token of vLLM, compared with `transformers serve`, over HTTP on this machine.

    python benchmarks/serving.py --vllm-python .venv-vllm/bin/python [--append benchmarks/RESULTS.md]

Two environments are needed, both with neo-hf: that of this script, which runs `transformers serve` (extra `clients`),
and that of vLLM, which `make test-vllm` sets up. It takes about ten minutes.

Both servers run NEO-nano unless `--model` is given, one after the other, in float32 on as many threads (`--threads`).
They answer streamed requests of 16 tokens: a question, and a question about an image. No image comes twice, so no
cache helps. At each concurrency, after a few requests that do not count, clients send one request after the other for
`--seconds`; those on their way then are waited for. A request that fails counts as an error and not as a request. The
first token is the median. The last column is the rate over that of `transformers serve`.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
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

import numpy as np
from openai import AsyncOpenAI
from PIL import Image
from reports import publish, table

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


def messages(number: int, with_image: bool) -> list[dict]:
    """The request of this number. Its image is the example, moved around its edges."""
    content: list[dict] = [{"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    if with_image:
        pixels = np.asarray(Image.open(EXAMPLE_IMAGE))
        file = io.BytesIO()
        Image.fromarray(np.roll(pixels, divmod(number, pixels.shape[1]), axis=(0, 1))).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


async def measure(
    client: AsyncOpenAI, model: str, numbers: Iterator[int], with_image: bool, concurrency: int, seconds
):
    """(requests per second, median seconds to the first token, errors)"""
    first_tokens, errors = [], 0

    async def ask() -> float:
        """Seconds to the first token."""
        request = messages(next(numbers), with_image)
        start = time.perf_counter()
        stream = await client.chat.completions.create(
            model=model, messages=request, max_tokens=NEW_TOKENS, temperature=0, stream=True
        )
        first = None
        async for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - start
        return time.perf_counter() - start if first is None else first

    async def work(end: float):
        nonlocal errors
        while time.perf_counter() < end:
            try:
                first_tokens.append(await ask())
            except Exception:  # the client's, and those of its HTTP library within a stream
                errors += 1

    await asyncio.gather(*(ask() for _ in range(min(concurrency, 4))))
    start = time.perf_counter()
    await asyncio.gather(*(work(start + seconds) for _ in range(concurrency)))
    elapsed = time.perf_counter() - start
    return len(first_tokens) / elapsed, statistics.median(first_tokens or [float("nan")]), errors


async def measure_server(server: str, address: str, model: str, arguments) -> dict[tuple, tuple]:
    results, numbers = {}, itertools.count()
    async with AsyncOpenAI(base_url=address, api_key="none", timeout=600, max_retries=0) as client:
        for kind, concurrency in itertools.product(("text", "image"), arguments.concurrency):
            result = await measure(client, model, numbers, kind == "image", concurrency, arguments.seconds)
            results[server, kind, concurrency] = result
            print(server, kind, concurrency, *result, file=sys.stderr)
    return results


def compare(model: str, arguments) -> dict[tuple, tuple]:
    """What `measure` gives for each server, kind of request and concurrency."""
    # The CPU build of vLLM has no `vllm serve`.
    vllm = [arguments.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32"]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--trust-remote-code"]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    # "nobind": as many threads as OMP_NUM_THREADS says, on any core.
    vllm_environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    results: dict = {}
    with serve(vllm, environment | vllm_environment) as address:
        results |= asyncio.run(measure_server("vLLM", address, model, arguments))
    with serve([*command, "--device", "cpu", "--dtype", "float32"], environment) as address:
        results |= asyncio.run(measure_server("transformers serve", address, model, arguments))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="Python of the environment with vLLM and neo-hf")
    parser.add_argument("--model", default=str(NANO))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=20, help="for each concurrency, kind of request and server")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--append", type=Path, help="file that the results are added to")
    arguments = parser.parse_args()

    versions = "import transformers, vllm; print(f'vLLM {vllm.__version__} with {transformers.__version__}')"
    versions = subprocess.check_output([arguments.vllm_python, "-c", versions], text=True).splitlines()[-1]

    with tempfile.TemporaryDirectory() as folder:
        for part in load_model_and_processor(arguments.model):
            part.save_pretrained(folder)  # with the code that `transformers serve` loads
        results = compare(folder, arguments)

    header = ["requests", "at once", "server", "requests/s", "first token", "errors", "ratio"]
    rows = []
    for kind, concurrency in itertools.product(("image", "text"), arguments.concurrency):
        for server in ("transformers serve", "vLLM"):
            rate, first, errors = results[server, kind, concurrency]
            ratio = rate / (results["transformers serve", kind, concurrency][0] or float("nan"))
            first = f"{first * 1000:,.0f} ms"
            rows.append([kind, concurrency, server, f"{rate:.1f}", first, errors, f"{ratio:.2f}"])
    publish(
        f"{os.cpu_count()} cores",
        ["float32", f"{arguments.threads} thread(s) for each server", versions],
        "Serving (`serving.py`)",
        table(header, rows),
        arguments.append,
    )


if __name__ == "__main__":
    main()
