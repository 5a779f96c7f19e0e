"""The stack that the benchmarks compare with: transformers + bitsandbytes + peft, as its users put it together.

One thing is done for it by hand. transformers 5 leaves Falcon's linears in 16 bits when asked for 4 (they are a subclass of nn.Linear,
which its replacement passes over), and says nothing; `quantize_by_hand` is what `load_in_4bit` promises.
"""

import torch

TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def make_hf(config, device="cuda", dtype=torch.bfloat16):
    """transformers' Falcon of this shape, random weights, in eval mode."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = FalconForCausalLM(FalconConfig(**{key: value for key, value in config.to_json().items() if value is not None}))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def quantize_by_hand(model, dtype=torch.bfloat16) -> None:
    """Every linear of the blocks to NF4 with double quantization, one at a time, computing in dtype."""
    import bitsandbytes as bnb

    for block in model.transformer.h:
        for parent, name in (
            (block.self_attention, "query_key_value"), (block.self_attention, "dense"),
            (block.mlp, "dense_h_to_4h"), (block.mlp, "dense_4h_to_h"),
        ):  # fmt: skip
            old = getattr(parent, name)
            with torch.device("meta"):                               # or it would draw 7 billion random weights on the CPU, half a minute
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
            setattr(parent, name, new.to(old.weight.device))
            old.weight.data = torch.empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attach_hf(model, rank: int, dropout: float = 0.0):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS)).eval()
