"""
Live video on the page of `neo-hf web`, whole: NEO-nano, Chromium with a camera that plays a clip, HTTP between them.

For a minute, the page shows frames at a wanted rate and asks a question every five seconds. Every ten seconds: frames
per second since the last line, the time of the last answer, what the cache holds, and memory of the server (RSS). One
thread for the model; the browser shares the machine. Needs the extra `web`, Playwright and Chromium (`make test-web`).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
from PIL import Image
from playwright.sync_api import sync_playwright

QUESTION = "Which way does the red circle move?"


def write_clip(file: Path):
    """Four seconds in which a red square of pixels moves to the right."""
    with av.open(file, "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("rawvideo", rate=20)
        stream.width = stream.height = 640
        stream.pix_fmt = "yuv420p"
        for number in range(80):
            image = Image.new("RGB", (640, 640), "white")
            image.paste("red", (40 + 4 * number, 80, 240 + 4 * number, 280))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def resident_megabytes(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=12, help="frames per second")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to hold")
    parser.add_argument("--port", type=int, default=7869)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        clip = Path(folder) / "clip.y4m"
        write_clip(clip)
        command = [sys.executable, "-m", "neo_hf_cli", "web", "nano", "--port", str(args.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            while "Running on local URL" not in server.stdout.readline():
                assert server.poll() is None, "the server did not start"
            camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", *camera, f"--use-file-for-fake-video-capture={clip}"],
            )
            measure(browser.new_page(), server, args)
            browser.close()
        finally:
            server.terminate()
            server.wait()


def measure(tab, server: subprocess.Popen, args: argparse.Namespace):
    def shown(name: str) -> str:
        return tab.locator(f"[data-show={name}]").inner_text()

    tab.goto(f"http://127.0.0.1:{args.port}")
    tab.get_by_role("tab", name="Live").click()
    tab.locator("[data-field=rate]").fill(str(args.rate))
    tab.locator("[data-field=budget]").fill(str(args.tokens))
    tab.locator("[data-do=camera]").click()
    tab.wait_for_function("Number(document.querySelector('[data-show=shown]').textContent) > 2")
    question = tab.locator("#live-question textarea, #live-question input")
    answer = tab.locator("#live-answer textarea")
    print("| seconds | frames/s | skipped | frame | answer | cache tokens | cache | server |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    started = last = time.perf_counter()
    first = before = int(shown("shown"))
    for number in range(args.seconds // 5):
        question.fill(f"{QUESTION}{' ' * (number % 2)}")
        question.press("Enter")
        tab.wait_for_timeout(1000 * (started + 5 * (number + 1) - time.perf_counter()))
        if number % 2:
            now, count = time.perf_counter(), int(shown("shown"))
            seconds = re.search(r"\((.*)\)", answer.input_value())
            print(
                f"| {now - started:.0f} | {(count - before) / (now - last):.1f} | {shown('skipped')} "
                f"| {shown('frame')} | {seconds[1] if seconds else '-'} | {shown('tokens')} | {shown('bytes')} "
                f"| {resident_megabytes(server):.0f} MB |",
                flush=True,
            )
            last, before = now, count
    rate = (before - first) / (last - started)
    print(f"\n{rate:.1f} frames per second of {args.rate:g} over {last - started:.0f} s")


if __name__ == "__main__":
    main()
