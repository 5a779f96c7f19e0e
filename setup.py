"""Metadata and packages of minqlora. The build backend and the tools' settings are in pyproject.toml.

`kernels/` stands beside `minqlora/` because it is read beside it, and it is installed *inside* it: a top-level package
called `kernels` would shadow the one of Hugging Face's that transformers and bitsandbytes import when they find the name.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="minqlora",
    version="0.1.0",
    description="QLoRA from scratch in PyTorch and Triton: NF4, double quantization, LoRA, a Falcon decoder, fused 4-bit kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["minqlora", "minqlora.kernels"],
    package_dir={"minqlora": "minqlora", "minqlora.kernels": "kernels"},
    install_requires=[
        "torch>=2.11,<3",
        # Only a GPU needs Triton, and its wheels are for Linux.
        "triton>=3.6,<4; platform_system == 'Linux'",
        "safetensors>=0.5,<1",
        "tokenizers>=0.21,<1",
        "huggingface_hub>=0.30,<3",
        "tqdm>=4.60,<5",
        "numpy>=1.26,<3",
    ],
    extras_require={
        # bitsandbytes, transformers and peft are oracles: the tests compare bytes, logits and adapter files with theirs.
        "test": [
            "pytest>=8,<10",
            "hypothesis>=6,<7",
            "coverage>=7,<8",
            "ruff>=0.9,<1",
            "bitsandbytes>=0.49,<1",
            "transformers>=5,<6",
            "peft>=0.18,<1",
        ],
        "plot": ["matplotlib>=3.8,<4"],
    },
)
