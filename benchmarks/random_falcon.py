"""Falcons of the published shapes with random weights, for measuring: speed and memory do not depend on what a weight is.

The 4-bit model is made layer by layer on the device, so that models which no disk here holds can be built: beside the finished
layers, one linear in 16 bits exists at a time.
"""

import torch

from minqlora import Falcon, FalconConfig, Linear4bit
from minqlora.lora import replace
from minqlora.qlora import block_linears

COMMON = dict(vocab_size=65024, bias=False, parallel_attn=True)
NEW = dict(new_decoder_architecture=True, multi_query=True, num_kv_heads=8)
SHAPES = {
    "falcon-7b": FalconConfig(hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, **COMMON),
    "falcon-11B": FalconConfig(
        hidden_size=4096, num_hidden_layers=60, num_attention_heads=32, ffn_hidden_size=16384, num_ln_in_parallel_attn=1,
        tie_word_embeddings=False, max_position_embeddings=8192, rope_theta=500042.0, **NEW, **COMMON,
    ),
    "falcon-40b": FalconConfig(hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, **NEW, **COMMON),
    "falcon-180B": FalconConfig(hidden_size=14848, num_hidden_layers=80, num_attention_heads=232, **NEW, **COMMON),
    # Stand-ins for LLaMA: its width, depth and heads, and an MLP of two matrices that has as many parameters as its three.
    "llama-33B": FalconConfig(
        hidden_size=6656, num_hidden_layers=60, num_attention_heads=52, ffn_hidden_size=26880, multi_query=False, **COMMON
    ),
    "llama-65B": FalconConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, ffn_hidden_size=33024, multi_query=False, **COMMON
    ),
}  # fmt: skip


@torch.no_grad()
def random_falcon(config: FalconConfig, device="cuda", dtype=torch.bfloat16, quantize: bool = True) -> Falcon:
    """A Falcon with normal weights of deviation 0.02, its block linears in NF4 with double quantization (or all in dtype)."""
    with torch.device("meta"):
        model = Falcon(config)
    for name, linear in block_linears(model).items():
        weight = torch.empty(linear.out_features, linear.in_features, device=device, dtype=dtype).normal_(std=0.02)
        if quantize:
            replace(model, name, Linear4bit.from_weight(weight))
        else:
            linear.weight = torch.nn.Parameter(weight)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, device=device, dtype=dtype)
                if isinstance(module, torch.nn.LayerNorm):
                    made.fill_(1.0 if name == "weight" else 0.0)
                else:
                    made.normal_(std=0.02)
                setattr(module, name, torch.nn.Parameter(made))
    if config.tie_word_embeddings is not False:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    return model
