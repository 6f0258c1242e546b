"""The public evaluation harnesses answer with what `generate()` answers."""

import pytest
import torch
from helpers import greedy_answer, image_message
from transformers import AutoModel, AutoTokenizer

TASK = """
task: neo_two_images
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_messages: !function utils.doc_to_messages
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, do_sample: false, min_pixels: 4096, max_pixels: 65536}}
process_results: !function utils.process_results
metric_list:
  - {{metric: answer, aggregation: !function utils.aggregate, higher_is_better: true}}
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"]]

def doc_to_text(doc, *args, **kwargs):
    return doc["question"]

def doc_to_messages(doc, *args, **kwargs):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]

def process_results(doc, results):
    return {"answer": results[0]}

def aggregate(results):
    return len(results)
"""


def test_call_of_vlmevalkit(hub_folder, real_vocabulary_model, processor, photographs):
    tokenizer = AutoTokenizer.from_pretrained(hub_folder, use_fast=False, trust_remote_code=True)
    model = AutoModel.from_pretrained(
        hub_folder,
        trust_remote_code=True,
        torch_dtype=torch.float32,
        load_in_8bit=False,
        low_cpu_mem_usage=True,
        device_map="cpu",
    ).eval()
    settings = {"max_new_tokens": 5, "do_sample": False}
    for system in (None, "Reason step by step."):
        model.system_message = system
        turn = image_message(photographs[0])
        inputs = processor(images=photographs[0], return_tensors="pt")
        answer = model.chat(
            tokenizer,
            pixel_values=inputs["pixel_values"],
            grid_hw=inputs["image_grid_hw"],
            question="<image>\nHm?",
            generation_config=settings,
            history=None,
            return_history=False,
            verbose=False,
        )
        messages = ([{"role": "system", "content": system}] if system else []) + [turn]
        assert answer == greedy_answer(real_vocabulary_model, processor, messages).strip()


def test_lmms_eval(hub_folder, real_vocabulary_model, processor, photographs, tmp_path):
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    import datasets
    from lmms_eval.tasks import TaskManager

    rows = [{"image": image, "question": "Hm?", "answer": ""} for image in photographs]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "data")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text(TASK.format(data=tmp_path / "data"))
    (tmp_path / "task" / "utils.py").write_text(UTILS)
    results = evaluator.simple_evaluate(
        model="neo_ov",
        model_args=f"pretrained={hub_folder},device=cpu,device_map=cpu,torch_dtype=float32",
        tasks=["neo_two_images"],
        task_manager=TaskManager(include_path=str(tmp_path / "task")),
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["neo_two_images"], key=lambda sample: sample["doc_id"])
    for sample, image in zip(samples, photographs, strict=True):
        inputs = processor(
            images=image,
            text="<|im_start|>system\nReason step by step.<|im_end|>\n<|im_start|>user\n<image>\nHm?<|im_end|>\n"
            "<|im_start|>assistant\n",
            return_tensors="pt",
        )
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()  # as neo_ov does
        output = real_vocabulary_model.generate(**inputs, max_new_tokens=5, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert sample["filtered_resps"] == [answer]
