"""What is saved loads in a fresh process without this package, through the Auto classes, as remote code."""

import json
import os
import sys

import pytest
import torch
from helpers import ROOT, random_model, run_without_package, tiny_config

CODE_FILES = {path.name for path in (ROOT / "src" / "neo_hf").glob("*_neo.py")}


def test_files(hub_folder):
    files = {path.name for path in hub_folder.iterdir()}
    assert files >= CODE_FILES | {"config.json", "model.safetensors", "processor_config.json", "chat_template.jinja"}
    assert {path for path in files if path.endswith(".py")} == CODE_FILES
    auto_map = json.loads((hub_folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoImageProcessor",
        "AutoProcessor",
        "AutoVideoProcessor",
    }


def test_remote_code(hub_folder, real_vocabulary_model, processor, photographs, clips, tmp_path):
    photographs[0].save(tmp_path / "photograph.png")
    script = """
        import torch
        from transformers import (
            AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM,
            AutoProcessor, AutoTokenizer,
        )
        from transformers.models.auto.video_processing_auto import AutoVideoProcessor
        folder, image, again, video = sys.argv[1:]
        for path in (folder, again):  # the second time what was saved from remote code
            trust = {"trust_remote_code": True}
            assert AutoConfig.from_pretrained(path, **trust).model_type == "neo"
            assert AutoImageProcessor.from_pretrained(path, **trust)(image).image_grid_hw.tolist() == [[12, 18]]
            processor = AutoProcessor.from_pretrained(path, **trust)
            found = AutoVideoProcessor.from_pretrained(path, **trust)(video, num_frames=3)
            assert found.image_grid_hw.tolist() == [[8, 12]] * 3
            prompt = processor(text="<video>Hm?", videos=video, num_frames=2)
            assert "[00:01.33]:<img>" in processor.decode(prompt.input_ids[0])
            content = [{"type": "image", "path": image}, {"type": "text", "text": "Hm?"}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )
            for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
                model = auto_class.from_pretrained(path, **trust)
                assert type(model).__module__.startswith("transformers_modules"), type(model)
                print("tokens", model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist())
            if path == folder:
                model.save_pretrained(again)
                processor.save_pretrained(again)
        # The calls of the public evaluation harnesses.
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False, trust_remote_code=True)
        model = AutoModel.from_pretrained(
            folder, trust_remote_code=True, torch_dtype=torch.float32, load_in_8bit=False, low_cpu_mem_usage=True,
            device_map="cpu",
        )
        model.system_message = "Reason step by step."
        pixels, grid = inputs["pixel_values"], inputs["image_grid_hw"]
        settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
        answer = model.chat(
            tokenizer, pixel_values=pixels, grid_hw=grid, question="Hm?", generation_config=settings, history=None,
            return_history=False, verbose=False,
        )
        print("answer", repr(answer))
    """
    run = run_without_package(
        script,
        hub_folder,
        tmp_path / "photograph.png",
        tmp_path / "again",
        clips / "carphone_pristine.mp4",
        cache=tmp_path / "cache",
    )
    assert run.returncode == 0, run.stderr
    message = {
        "role": "user",
        "content": [{"type": "image", "image": photographs[0]}, {"type": "text", "text": "Hm?"}],
    }
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = real_vocabulary_model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    # Other packages may print as well.
    *outputs, answer = [line for line in run.stdout.splitlines() if line.startswith(("tokens ", "answer "))]
    assert outputs == [f"tokens {expected}"] * 6
    assert len(answer) > len("answer ''")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE_FILES


@pytest.mark.parametrize("version", ["4.57.1", "5.18.1", "6.0.0"])
def test_other_versions_of_transformers_are_refused(hub_folder, tmp_path, version):
    script = f"""
        from transformers import AutoModel, AutoProcessor
        sys.modules["transformers"].__version__ = {version!r}
        for auto_class in (AutoModel, AutoProcessor):
            try:
                auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
            except ImportError as error:
                print(error)
    """
    run = run_without_package(script, hub_folder, cache=tmp_path)
    sentence = f"NEO needs transformers>=5.19,<6, but transformers {version} is installed."
    assert run.stdout.splitlines() == [sentence] * 2, run.stderr


def test_code_files_import_only_what_remote_code_may():
    """No sub-packages, no `from . import`, nothing of this package by its own name."""
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    import neo_hf

    folder = os.path.dirname(neo_hf.__file__)
    for file in CODE_FILES:
        assert {f"{name}.py" for name in get_relative_imports(os.path.join(folder, file))} <= CODE_FILES
        assert set(get_imports(os.path.join(folder, file))) - sys.stdlib_module_names <= {
            "huggingface_hub", "numpy", "packaging", "PIL", "safetensors", "tokenizers", "torch", "transformers",
        }  # fmt: skip


def test_save_load_identity(tmp_path):
    model = random_model(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for part in ("text_config", "vision_config"):
        kept = [getattr(m.config, part).to_diff_dict() | {"dtype": None} for m in (model, again)]
        assert kept[0] == kept[1]
