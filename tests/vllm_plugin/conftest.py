import contextlib
import json
import os
import shutil
from importlib.util import find_spec

import pytest
from helpers import GOLDEN, random_model, tiny_config

from neo_hf.loading import NANO, load_model_and_processor
from neo_hf.raw import RAW_TOKEN_ID_NAMES

# "nobind": otherwise, two processes need two NUMA nodes.
if find_spec("vllm"):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
# NEO-nano's tokenizer is in the folder of each tiny model.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
NANO_CONFIG = json.loads((NANO / "config.json").read_text())
NANO_IDS = {name: NANO_CONFIG[name] for name in RAW_TOKEN_ID_NAMES}


@pytest.fixture(scope="module")
def start():
    """Start vLLM on a folder, in float32. The engine of the last call is stopped before."""
    vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
    psutil = pytest.importorskip("psutil")
    running = []

    def stop():
        while running:
            # A process may end by itself just before vLLM ends it.
            with contextlib.suppress(psutil.NoSuchProcess):
                running.pop().llm_engine.engine_core.shutdown()

    def start(folder, **settings):
        stop()
        settings = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "limit_mm_per_prompt": {"image": 6, "video": 1},
            "mm_processor_cache_gb": 0.1,
            **settings,
        }
        running.append(vllm.LLM(str(folder), **settings))
        return running[-1]

    yield start
    stop()


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory):
    """The recorded tiny model in its raw layout: untied, two key/value heads of four."""
    folder = tmp_path_factory.mktemp("golden") / "raw"
    shutil.copytree(GOLDEN / "neo_tiny" / "raw", folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {"min_pixels": 4096, "max_pixels": 65536}
    config |= {raw_name: NANO_IDS[name] for name, raw_name in RAW_TOKEN_ID_NAMES.items()}
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copy(NANO / name, folder)
    return folder


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """A random model with NEO-9B's ratio of heads, four to one, tied."""
    folder = tmp_path_factory.mktemp("wide") / "hub"
    text = {"num_attention_heads": 8, "num_key_value_heads": 2, "eos_token_id": 2}
    config = tiny_config(NANO_CONFIG["text_config"]["vocab_size"], text_config=text, tie_word_embeddings=True)
    for name, token_id in NANO_IDS.items():
        setattr(config, name, token_id)
    random_model(config).save_pretrained(folder)
    _, processor = load_model_and_processor(NANO)
    processor.image_processor.patch_size = processor.video_processor.patch_size = 16
    processor.save_pretrained(folder)
    return folder
