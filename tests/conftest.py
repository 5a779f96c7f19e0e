"""What every test shares: which device is there, and two habits that keep the tests honest.

The repository's root stays off `sys.path`: from there, `import kernels` would find our folder instead of Hugging Face's package
of that name. And nothing asks a model hub: the oracles (bitsandbytes, transformers, peft) run offline.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models here are so small that threads wait for each other longer than they work: the suite takes a fifth of the time with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture(scope="session")
def small_falcon(tmp_path_factory):
    """Directory of a small random Falcon in Hugging Face's layout, with a byte-level BPE tokenizer whose id 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from minqlora.falcon import Falcon, FalconConfig
    from minqlora.load import save_falcon

    directory = tmp_path_factory.mktemp("small_falcon")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["Question: What is a bond?\nAnswer: A bond is a loan. A stock is a share of a company."] * 9, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(0)
    # Ten times the usual spread: at 0.02 a model this narrow hardly depends on its input.
    config = FalconConfig(320, 32, 2, 2, max_position_embeddings=128, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    save_falcon(Falcon(config), directory)
    return directory
