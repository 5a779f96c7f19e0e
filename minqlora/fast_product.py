"""13. Linears with LoRA as one matrix product, for training on a GPU.

`lora.py` is the definition: y = base(x) + scale * B(A(D(x))), D the dropout, for one linear. `fast.py` multiplies by the products below
instead, and they spare a GPU two things.

**LoRA costs more in traffic than in arithmetic.** Written out, `base(x) + scale * B(A(x))` writes the large output three
times and reads it twice. But a sum of two products is one product over a longer inner dimension:

    y = x W^T + (D(x) A^T) (scale B)^T = [x | D(x) A^T] [W | scale B]^T              (M, K + rank) times (N, K + rank)^T

for M tokens, K = in_features, N = out_features. The weight is dequantized into a workspace anyway, so `scale B` goes into `rank` more
columns of it, and x has `rank` spare columns where x A^T is written. One matrix product, accumulated in float32, no pass over y. The
backward has the same form, dy times [W | scale B]; its spare columns are `dxa`, the gradient of xa = D(x) A^T:

    [dy W | dxa] = dy [W | scale B]                  dxa = dy (scale B)      (M, rank)
    dx = dy W + D(dxa A)                             dA = dxa^T D(x)         dB = scale dy^T xa

(The backward of a dropout is the same dropout, so D stands before dxa A too.)

**Linears that share an input, or add into one output, are one product.** Where a block has one norm (7b, 11B), the projection up and
query_key_value read the same h; in every parallel block the projection down and dense add into the residual. Without dropout:

    [up | qkv] = [h | h A_up^T | h A_qkv^T] [[W_up, s B_up, 0], [W_qkv, 0, s B_qkv]]^T
    out        = x + [g | a | g A_down^T | a A_dense^T] [W_down | W_dense | s B_down | s B_dense]^T

with h = norm(x), g = gelu(up), a = attention(qkv), s = scale. Such a set of linears is a `Product`; fast.py calls the two the readers
(of h) and the writer (into x). What is shared is read once for the gradients of A and B, too (for A only without dropout: each linear
drops its own).
"""

import torch
from torch import Tensor, nn

from minqlora.lora import LoRALinear


def drop(x: Tensor, probability: float, seed: Tensor) -> Tensor:
    """Dropout of x (M, N) that a backward can repeat: the seed () decides what is kept, so that no mask is stored.

    On a CPU a seed keeps other values than on a GPU.
    """
    if x.is_cuda:
        from minqlora.kernels.dropout import drop as kernel

        return kernel(x, probability, seed)
    chance = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed.item()))
    return torch.where(chance >= probability, x / (1 - probability), 0.0).to(x.dtype)


def dropped(x: Tensor, linear: LoRALinear, seed: Tensor) -> Tensor:
    return drop(x, linear.dropout, seed) if drops(linear) else x


def drops(linear: LoRALinear) -> bool:
    return linear.training and linear.dropout > 0


def slices(sizes: list[int], start: int = 0) -> list[slice]:
    ends = [start + sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def dequantize_into(base: nn.Module, out: Tensor) -> None:
    """The weight of a linear into a strided (out_features, in_features) view, in one launch on a GPU."""
    if isinstance(base, nn.Linear):
        out.copy_(base.weight)
    else:
        base.dequantize(out.dtype, out=out)


class Product:
    """Some LoRA linears as one matrix product: they share an input and stand above each other, or they add into one output.

    apart, for linears that add: one product after the other instead, so that the weight of one alone is dequantized at a time.
    """

    def __init__(self, linears: list[LoRALinear], share_input: bool, apart: bool = False):
        self.linears, self.share_input, self.apart = linears, share_input, apart
        ins, outs = [linear.in_features for linear in linears], [linear.out_features for linear in linears]
        self.width = ins[0] if share_input else sum(ins)             # of the input, before the spare columns
        self.rows = sum(outs) if share_input else outs[0]            # of the weight: features of the output
        self.ranks = [linear.lora_A.shape[0] for linear in linears]
        self.full_width = self.width + sum(self.ranks)
        # For each linear: its columns of the input, its spare columns, its rows of the weight, which are its columns of the output.
        self.columns = [slice(0, ins[0])] * len(linears) if share_input else slices(ins)
        self.spare = slices(self.ranks, self.width)
        self.places = slices(outs) if share_input else [slice(0, outs[0])] * len(linears)
        self.kept_weight = None                                      # where memory is left over: what `dequantized` gave, for good

    def add_lora_columns(self, x: Tensor, seeds: Tensor) -> None:
        """Fill the spare columns of x (M, full_width) with dropout(x) A^T, for each linear."""
        if self.share_input and not any(map(drops, self.linears)):
            torch.mm(x[:, : self.width], self.stacked_A(x.dtype).T, out=x[:, self.width :])
            return
        for linear, columns, spare, seed in zip(self.linears, self.columns, self.spare, seeds, strict=True):
            torch.mm(dropped(x[:, columns], linear, seed), linear.lora_A.to(x.dtype).T, out=x[:, spare])

    def stacked_A(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([linear.lora_A for linear in self.linears]).to(dtype)          # (sum of ranks, width)

    def weight(self, like: Tensor) -> Tensor:
        """[W | scale B], (rows, full_width): a workspace that the caller frees, or the kept one; B as it is now."""
        weight = self.dequantized(like) if self.kept_weight is None else self.kept_weight
        for linear, spare, places in zip(self.linears, self.spare, self.places, strict=True):
            torch.mul(linear.lora_B.detach(), linear.scale, out=weight[places, spare])
        return weight

    def dequantized(self, like: Tensor) -> Tensor:
        """[W | scale B] with the places of scale B left unset; where the input is shared, 0 in the other linears' spare columns."""
        weight = like.new_empty(self.rows, self.full_width)
        for i, (linear, columns, places) in enumerate(zip(self.linears, self.columns, self.places, strict=True)):
            dequantize_into(linear.base, weight[places, columns])
            for j, spare in enumerate(self.spare):
                if i != j and self.share_input:
                    weight[places, spare] = 0                        # one linear's LoRA adds nothing to the other's output
        return weight

    def onto(self, x: Tensor, wide: Tensor) -> Tensor:
        """x + wide [W | scale B]^T, for linears that add: (M, rows)."""
        if self.kept_weight is not None or not self.apart:
            return torch.addmm(x, wide, self.weight(x).T)
        for linear, columns, spare in zip(self.linears, self.columns, self.spare, strict=True):
            x = torch.addmm(x, wide[:, columns], self.alone(linear, x).T)
            x = torch.addmm(x, wide[:, spare], (linear.lora_B * linear.scale).to(x.dtype).T)
        return x

    def back_into(self, grad: Tensor, wide: Tensor) -> None:
        """wide = grad [W | scale B], for linears that add: (M, full_width)."""
        if self.kept_weight is not None or not self.apart:
            torch.mm(grad, self.weight(grad), out=wide)
            return
        for linear, columns, spare in zip(self.linears, self.columns, self.spare, strict=True):
            torch.mm(grad, self.alone(linear, grad), out=wide[:, columns])
            torch.mm(grad, (linear.lora_B * linear.scale).to(grad.dtype), out=wide[:, spare])

    def alone(self, linear: LoRALinear, like: Tensor) -> Tensor:
        """W of one linear: (out_features, in_features), a workspace that the caller frees."""
        weight = like.new_empty(linear.out_features, linear.in_features)
        dequantize_into(linear.base, weight)
        return weight

    def dxa(self, wide: Tensor, i: int) -> Tensor:
        """Of the gradient of a widened input, what belongs to linear i's xa: (M, rank)."""
        return wide[:, self.spare[i]]

    def add_lora_gradient_(self, wide: Tensor, i: int, seed: Tensor) -> None:
        """Add dxa A to the gradient of linear i's input."""
        linear, columns = self.linears[i], wide[:, self.columns[i]]
        if drops(linear):
            columns += dropped(self.dxa(wide, i) @ linear.lora_A.to(wide.dtype), linear, seed)
        else:
            columns.addmm_(self.dxa(wide, i), linear.lora_A.to(wide.dtype))

    def add_lora_gradients_(self, wide: Tensor, seeds: Tensor) -> None:
        """The same for all linears, which share their input: one pass over it where nothing is dropped."""
        if any(map(drops, self.linears)):
            for i, seed in enumerate(seeds):
                self.add_lora_gradient_(wide, i, seed)
        else:
            wide[:, : self.width].addmm_(wide[:, self.width :], self.stacked_A(wide.dtype))

    def adapter_gradients(self, inputs: list[Tensor], xa: Tensor, wide: Tensor, grads: list[Tensor], seeds: Tensor) -> list[Tensor]:
        """Of lora_A and lora_B of each linear in turn.

        inputs (M, in_features) and grads, the outputs' gradients (M, out_features), are one for each linear, the same tensor where it is
        shared; xa (M, sum of ranks) is that of each; wide the gradient of the widened input. What is shared is read once.
        """
        if self.share_input and not any(map(drops, self.linears)):
            grads_A = (wide[:, self.width :].T @ inputs[0]).split(self.ranks)
        else:
            grads_A = [self.dxa(wide, i).T @ dropped(x, linear, seed)
                       for i, (x, linear, seed) in enumerate(zip(inputs, self.linears, seeds, strict=True))]
        if self.share_input:
            grads_B = [grad.T @ some for grad, some in zip(grads, xa.split(self.ranks, dim=1), strict=True)]
        else:
            grads_B = (grads[0].T @ xa).split(self.ranks, dim=1)
        return [gradient.to(matrix.dtype)
                for linear, grad_A, grad_B in zip(self.linears, grads_A, grads_B, strict=True)
                for gradient, matrix in ((grad_A, linear.lora_A), (grad_B * linear.scale, linear.lora_B))]
