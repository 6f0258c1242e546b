"""Log-probabilities of vLLM against the model's own, since greedy tokens can agree under a wrong mask."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm")
