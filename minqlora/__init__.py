"""QLoRA from scratch. Read the modules in the order of the README; these are the names that others call."""

from minqlora.double_quant import double_dequantize, double_quantize
from minqlora.falcon import Falcon, FalconConfig
from minqlora.generate import generate
from minqlora.linear4bit import Linear4bit
from minqlora.load import load_falcon
from minqlora.lora import LoRALinear, load_adapter, save_adapter
from minqlora.nf4 import FP4, NF4, dequantize_4bit, quantize_4bit
from minqlora.qlora import add_lora, merge_lora

__all__ = [
    "FP4", "NF4", "Falcon", "FalconConfig", "Linear4bit", "LoRALinear", "add_lora", "dequantize_4bit", "double_dequantize",
    "double_quantize", "generate", "load_adapter", "load_falcon", "merge_lora", "quantize_4bit", "save_adapter",
]  # fmt: skip
