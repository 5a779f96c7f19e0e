"""AdamW, the optimizer of the adapters."""

from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("adamw",)


def make_optimizer(parameters: Iterable[nn.Parameter], name: str = "adamw", lr: float = 2e-4,
                   betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                   weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """The optimizer of that name over the parameters that require a gradient. The defaults are the paper's."""
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError("parameters: none requires a gradient, so there is nothing to train (add_lora comes first)")
    if name == "adamw":
        # One launch for all parameters on a GPU; the plain loop elsewhere.
        fused = all(p.is_cuda for p in parameters)
        return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=fused)
    raise ValueError(f"optimizer {name!r} is not one of {', '.join(OPTIMIZERS)}")
