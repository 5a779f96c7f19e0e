"""What every test shares: which device is there, and two habits that keep the tests honest.

The repository's root stays off `sys.path`: from there, `import kernels` would find our folder instead of Hugging Face's package
of that name. And nothing asks a model hub: the oracles (bitsandbytes, transformers, peft) run offline.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be switched on before the first `@triton.jit`.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != ROOT]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
