"""5. QLoRA: the whole recipe on one page (Eq. 5).

    Y = X · dequant(dequant(absmax2, codes), packed)^T  +  scale · (X A^T) B^T
        frozen, 4 bits                                     trained

1. `quantize_linears` puts every linear layer of every block into 4 bits. (A loader does the same tensor by tensor, so that the
   16-bit model is never in memory.) Embeddings, norms and the head keep their type.
2. `add_lora` freezes the model and wraps those layers. *Every* linear layer of every block: the paper finds (Figure 2) that this is
   what it takes to match full fine-tuning, and that the rank hardly matters then.
3. Train. The gradient flows through the 4-bit weights into A and B.
4. `merge_lora` gives a plain 16-bit model. It adds the adapters to the *dequantized* weight, which is what they were trained beside,
   and does not quantize again: that would round away the very differences that training made.
"""

import torch
from torch import nn

from minqlora.linear4bit import Linear4bit, frozen
from minqlora.lora import LoRALinear, adapters, linears, matches, replace
from minqlora.nf4 import NF4


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks, by name: those with a number on their path, as in transformer.h.0.mlp.dense_h_to_4h."""
    return {name: module for name, module in linears(model).items() if any(part.isdigit() for part in name.split("."))}


def quantize_linears(model: nn.Module, code=NF4, blocksize: int = 64, double_quant: bool = True) -> nn.Module:
    """Replace every nn.Linear of every block by a Linear4bit, one at a time, in place."""
    if adapters(model):
        raise ValueError(f"the model has adapters, on {len(adapters(model))} layers; quantize it before add_lora")
    for name, linear in block_linears(model).items():
        if isinstance(linear, nn.Linear):
            replace(model, name, Linear4bit.from_weight(linear.weight, linear.bias, code, blocksize, double_quant))
    return model


def add_lora(model: nn.Module, rank: int = 64, alpha: float = 16, dropout: float = 0.1, targets="all", dtype=torch.float32) -> nn.Module:
    """Freeze the model and give its linear layers adapters, in place.

    targets is "all" (every linear layer of every block, as the paper does), or names: the ends of layer names, such as
    ["query_key_value", "mlp.dense_h_to_4h"]. dtype is that of A and B. The defaults are the paper's, for models of 7 and 13 billion.
    ValueError, and an unchanged model, if it has adapters already or a target matches nothing.
    """
    if adapters(model):
        raise ValueError(f"the model has adapters already, on {len(adapters(model))} layers; merge_lora merges them first")
    layers = block_linears(model)
    if not layers:
        raise ValueError("the model has no linear layer in a numbered block, so there is nothing to adapt")
    if targets != "all":
        wanted = [targets] if isinstance(targets, str) else list(targets)
        valid = sorted({name.rpartition(".")[2] for name in layers})
        lost = [target for target in wanted if not any(matches(name, target) for name in layers)]
        if lost or not wanted:
            raise ValueError(f"targets {lost or wanted} match no linear layer of a block; the model has {', '.join(valid)}")
        layers = {name: layer for name, layer in layers.items() if any(matches(name, target) for target in wanted)}
    # All are made before the first is put in: an error leaves the model as it was.
    wrapped = {name: LoRALinear(layer, rank, alpha, dropout, dtype).train(layer.training) for name, layer in layers.items()}
    model.requires_grad_(False)
    for name, layer in wrapped.items():
        replace(model, name, layer)
    return model


@torch.no_grad()
def merge_lora(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """W = dequant(W) + scale · B A, summed in float32 and rounded once, in place: a model of plain nn.Linear, all in dtype.

    A layer in 4 bits without an adapter is dequantized too. One float32 layer exists at a time.
    """
    for name, layer in adapters(model).items():
        weight = torch.addmm(weight_of(layer.base), layer.lora_B.float(), layer.lora_A.float(), alpha=layer.scale)
        replace(model, name, plain_linear(weight, layer.base.bias, dtype))
    for name, layer in linears(model).items():
        if isinstance(layer, Linear4bit):
            replace(model, name, plain_linear(weight_of(layer), layer.bias, dtype))
    return model.to(dtype)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight in float32: (out_features, in_features)."""
    return layer.dequantize() if isinstance(layer, Linear4bit) else layer.weight.float()


def plain_linear(weight, bias, dtype) -> nn.Linear:
    """A frozen nn.Linear in dtype. On meta the layer costs no memory before its values are put in."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = frozen(weight.to(dtype))
    linear.bias = None if bias is None else frozen(bias.to(dtype))
    return linear


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total). A weight in 4 bits counts out_features × in_features; its two-to-a-byte storage would count half of that."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            stored = sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
            total += layer.out_features * layer.in_features - stored
    return trainable, total
