"""A Space that serves the page of `neo-hf web`."""

import os

import torch

from neo_hf.loading import NANO, load_model_and_processor
from neo_hf.web import Page

# The model: a Hub id, from the Space's variables, or NEO-nano, which comes with the package.
name = os.environ.get("MODEL", "nano")
model, processor = load_model_and_processor(NANO if name == "nano" else name)
model = model.to("cuda" if torch.cuda.is_available() else "cpu")
page = Page({name: (model, processor)}, frame_side=64 if name == "nano" else 448)

if __name__ == "__main__":
    page.launch()
