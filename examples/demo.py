"""A small NEO end to end: made, saved, loaded back as remote code in a new process, and asked about a photograph.

The weights are random and so is the answer: it shows that everything fits together, not what NEO can do.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from neo_hf import NeoConfig, NeoForConditionalGeneration, NeoImageProcessor, NeoProcessor
from neo_hf.tokenization import load_qwen_package_tokenizer

ASK = """
import sys
sys.modules["neo_hf"] = None  # nothing but what is in the folder
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, photograph, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": photograph}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
visual = int(inputs["image_grid_hw"].prod()) // 4
print(f"prompt:   {inputs['input_ids'].shape[1]} tokens, {visual} of them visual")
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print("answer:  ", repr(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


def main():
    torch.manual_seed(0)
    config = NeoConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_pre_buffer_layers": 2,
        },
        vision_config={"hidden_size": 64},
    )
    model = NeoForConditionalGeneration(config)
    processor = NeoProcessor(NeoImageProcessor(), load_qwen_package_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        photograph = Path(folder) / "flower.jpg"
        Image.fromarray(load_sample_image("flower.jpg")).save(photograph)
        model.save_pretrained(Path(folder) / "neo-random")
        processor.save_pretrained(Path(folder) / "neo-random")
        question = "What is in this photograph?"
        print(f"model:    {model.num_parameters():,} random weights, with the vocabulary of Qwen3")
        print(f"question: {question} (flower.jpg)", flush=True)
        subprocess.run([sys.executable, "-c", ASK, Path(folder) / "neo-random", photograph, question], check=True)
    print("The weights are random, so the answer means nothing.")


if __name__ == "__main__":
    main()
