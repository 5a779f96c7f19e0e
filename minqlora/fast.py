"""13. The same block and the same loss for training on a GPU, in fewer and larger steps.

`falcon.py` and `lora.py` are the definition. They spend a GPU's time badly in four places, and this file is their pair: a hand-written
forward and backward of a whole parallel block, and of the loss, installed over a Falcon by `fuse(model)` and tested equal to it.

**1. LoRA costs more in traffic than in arithmetic.** Written out, `base(x) + scale * B(A(x))` reads and writes the large output three
times. But a sum of two products is one product over a longer inner dimension:

    y = x W^T + (x A^T) (scale B)^T = [x | x A^T] [W | scale B]^T                    (M, K + rank) times (N, K + rank)^T

The weight is dequantized into a workspace anyway, so `scale B` goes into `rank` more columns of it, and x has `rank` spare columns
where x A^T is written. One matrix product, accumulated in float32, no pass over y. The backward has the same form: dy times
[W | scale B] is [dy W | d(x A^T)], both at once.

**2. Linears that share an input, or add into one output, are one product.** Where a block has one norm (7b, 11B), the projection up and
query_key_value read the same x; in every parallel block the projection down and dense add into the residual:

    [up | qkv] = [h | h A_up^T | h A_qkv^T] [[W_up, s B_up, 0], [W_qkv, 0, s B_qkv]]^T
    out        = x + [g | a | g A_down^T | a A_dense^T] [W_down | W_dense | s B_down | s B_dense]^T

with h = norm(x), g = gelu(up), a = attention(qkv).

**3. Recomputing a whole block computes what nobody reads.** The backward of a linear wants its *input*, never its output. So when only x
is kept, the products down and dense, half of the block, need not be done again: a step costs 2.5 forward passes and not 3. What is
small and dear is kept beside x: x A^T of all four linears, 4 * rank values a token. Where memory is left over (`keep_bytes`), the last
blocks keep their products and their attention too, and recompute norm and GELU alone: 2 forward passes.

**4. The logits are the largest tensor of a step**, and the loss wants one number a token of them. They are made in chunks of tokens, and
the gradient is taken at once, while the chunk is there.

What is left of element-wise work (norm, GELU, rotary positions, softmax) is written in PyTorch and compiled, so that each is one pass.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora.falcon import Context, Falcon, FalconAttention, FalconBlock
from minqlora.lora import LoRALinear, linears


def compiled(function):
    """One pass over memory on a GPU. On a CPU the function runs as it is written."""
    fused = torch.compile(function)

    @functools.wraps(function)
    def call(first, *rest):
        return (fused if first.is_cuda else function)(first, *rest)

    return call


@compiled
def norm_into(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(F.layer_norm(x, weight.shape, weight, bias, eps))


@compiled
def norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor, onto: Tensor) -> Tensor:
    """onto + the gradient of norm(x) with respect to x. Mean and deviation are cheaper to compute again than to keep."""
    centred = x.float() - x.float().mean(dim=1, keepdim=True)                     # (M, K)
    rdeviation = (centred.square().mean(dim=1, keepdim=True) + eps).rsqrt()       # (M, 1)
    normal = centred * rdeviation
    grad = grad.float() * weight.float()
    grad = grad - grad.mean(dim=1, keepdim=True) - normal * (grad * normal).mean(dim=1, keepdim=True)
    return (onto.float() + grad * rdeviation).to(x.dtype)


@compiled
def gelu_into(x: Tensor, out: Tensor) -> None:
    out.copy_(F.gelu(x))


@compiled
def gelu_backward_into(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """d/dx [x Phi(x)] = Phi(x) + x phi(x), with the normal distribution's Phi and phi."""
    wide = x.float()
    slope = 0.5 * (1 + torch.erf(wide * 0.5**0.5)) + wide * torch.exp(-0.5 * wide.square()) * 0.3989422804014327
    out.copy_(grad.float() * slope)


@compiled
def loss_and_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of a chunk; the logits are overwritten by its gradient, softmax - one-hot."""
    wide = logits.float()                                                         # (chunk, vocab); a register at a time, never in memory
    total = wide.logsumexp(dim=1, keepdim=True)                                   # (chunk, 1)
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    loss = torch.where(is_label, total - wide, 0.0).sum()
    logits.copy_((wide - total).exp() - is_label.float())
    return loss


@compiled
def mix(qkv: Tensor, attention: FalconAttention, context: Context) -> Tensor:
    return attention.mix(qkv, context)


@compiled
def drop(x: Tensor, probability: float, seed: Tensor) -> Tensor:
    """Dropout that a backward can repeat: element i is kept or not by a hash of seed + i, so that no mask is stored."""
    bits = torch.arange(x.numel(), device=x.device).view(x.shape) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):                    # the finalizer of MurmurHash3, in 64-bit integers
        bits = bits & 0xFFFFFFFF
        bits = (bits ^ (bits >> shift)) * factor
    bits = bits & 0xFFFFFFFF
    kept = (bits ^ (bits >> 16)) >= probability * 2**32
    return torch.where(kept, x / (1 - probability), 0.0).to(x.dtype)


class Product:
    """Some LoRA linears as one matrix product: they share an input and stand above each other, or they add into one output."""

    def __init__(self, linears: list[LoRALinear], share_input: bool):
        self.linears = linears
        ins, outs = [linear.in_features for linear in linears], [linear.out_features for linear in linears]
        self.width = ins[0] if share_input else sum(ins)             # of the input, before the spare columns
        self.rows = outs[0] if not share_input else sum(outs)        # of the weight: features of the output
        ranks = [linear.lora_A.shape[0] for linear in linears]
        self.full_width = self.width + sum(ranks)
        # For each linear: its columns of the input, its spare columns, its rows of the weight.
        whole_input, whole_output = [slice(0, ins[0])] * len(linears), [slice(0, outs[0])] * len(linears)
        self.columns = whole_input if share_input else slices(ins)
        self.spare = slices(ranks, self.width)
        self.places = slices(outs) if share_input else whole_output

    def __iter__(self):
        return zip(self.linears, self.columns, self.spare, self.places, strict=True)

    def add_lora_columns(self, x: Tensor, seeds: Tensor) -> None:
        """Fill the spare columns of x (M, full_width) with dropout(x) A^T, for each linear."""
        for (linear, columns, spare, _), seed in zip(self, seeds, strict=True):
            x[:, spare] = dropped(x[:, columns], linear, seed) @ linear.lora_A.to(x.dtype).T

    def weight(self, like: Tensor) -> Tensor:
        """[W | scale B], (rows, full_width): a workspace that the caller drops."""
        weight = like.new_empty(self.rows, self.full_width)
        if self.rows != self.linears[0].out_features:
            weight[:, self.width :] = 0                              # a linear's spare columns are zero in the rows of the others
        for linear, columns, spare, places in self:
            dequantize_into(linear.base, weight[places, columns])
            weight[places, spare] = linear.lora_B * linear.scale
        return weight

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor, seeds: Tensor, for_input: bool):
        """From the gradient of the output (M, rows): that of the input (M, width), or None, and of each lora_A and lora_B."""
        first = 0 if for_input else self.width
        wide = grad @ weight[:, first:]                              # (M, full_width), or its spare columns alone
        adapters = []
        for (linear, columns, spare, places), seed in zip(self, seeds, strict=True):
            inner = wide[:, spare.start - first : spare.stop - first]                                 # (M, rank): of x A^T
            grad_A = inner.T @ dropped(x[:, columns], linear, seed)
            grad_B = (grad[:, places].T @ x[:, spare]) * linear.scale
            adapters += [grad_A.to(linear.lora_A.dtype), grad_B.to(linear.lora_B.dtype)]
            if for_input and linear.dropout:
                wide[:, columns] += dropped(inner @ linear.lora_A.to(wide.dtype), linear, seed)
            elif for_input:
                wide[:, columns].addmm_(inner, linear.lora_A.to(wide.dtype))
        return wide[:, : self.width] if for_input else None, adapters


def dropped(x: Tensor, linear: LoRALinear, seed: Tensor) -> Tensor:
    return drop(x, linear.dropout, seed) if linear.training and linear.dropout else x


def slices(sizes: list[int], start: int = 0) -> list[slice]:
    ends = [start + sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def dequantize_into(base: nn.Module, out: Tensor) -> None:
    """The weight of a linear into a strided (out_features, in_features) view, in one launch on a GPU."""
    if isinstance(base, nn.Linear):
        out.copy_(base.weight)
    else:
        base.dequantize(out.dtype, out=out)


class FusedBlock:
    """A parallel FalconBlock in three steps: read (norm, the linears behind it), mix (attention), write (the linears that add into x)."""

    def __init__(self, block: FalconBlock):
        self.attention = block.self_attention
        up, down = block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h
        qkv, dense = block.self_attention.query_key_value, block.self_attention.dense
        if block.config.num_ln_in_parallel_attn == 2:
            self.norms, self.readers = [block.ln_mlp, block.ln_attn], [Product([up], True), Product([qkv], True)]
        else:
            self.norms, self.readers = [block.input_layernorm], [Product([up, qkv], True)]
        self.writer = Product([down, dense], False)
        linears = [up, qkv, down, dense]
        self.adapters = [matrix for linear in linears for matrix in (linear.lora_A, linear.lora_B)]    # in the order of their gradients
        # What a kept block holds a token: up and qkv, the mixed values, and the turned queries, keys and values that attention's own
        # backward reads.
        self.kept_width = up.out_features + 2 * qkv.out_features + dense.in_features

    def normed(self, x: Tensor) -> list[Tensor]:
        """norm(x) for each reader, (M, full_width), with the spare columns still to fill."""
        inputs = []
        for norm, product in zip(self.norms, self.readers, strict=True):
            inputs.append(x.new_empty(len(x), product.full_width))
            norm_into(x, norm.weight, norm.bias, norm.eps, inputs[-1][:, : product.width])
        return inputs

    def read(self, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """[up (M, ffn), qkv (M, rows of query_key_value)]"""
        outputs = [h @ weight.T for h, weight in zip(inputs, weights, strict=True)]
        return [y[:, places] for y, product in zip(outputs, self.readers, strict=True) for places in product.places]

    def activated(self, up: Tensor, mixed: Tensor) -> Tensor:
        """[gelu(up) | mixed | spare columns, still to fill], (M, full_width of the writer)."""
        g = up.new_empty(len(up), self.writer.full_width)
        gelu_into(up, g[:, self.writer.columns[0]])
        g[:, self.writer.columns[1]] = mixed
        return g


class FusedForward(torch.autograd.Function):
    """x + attention(norm x) + mlp(norm x) for x (M, hidden_size), M = batch * tokens. The adapters are arguments to receive gradients."""

    @staticmethod
    def forward(ctx, x, block, context, shape, keep, *adapters):
        seeds = torch.randint(2**31, (4,), device=x.device)          # of dropout: drawn on the device, so nothing waits
        inputs = block.normed(x)
        for h, product, some in zip(inputs, block.readers, seeds_of(block, seeds), strict=True):
            product.add_lora_columns(h, some)
        up, qkv = block.read(inputs, [product.weight(x) for product in block.readers])
        with torch.set_grad_enabled(keep):
            qkv = qkv.unflatten(0, shape).detach().requires_grad_(keep)
            mixed = mix(qkv, block.attention, context)               # (batch, tokens, hidden_size)
        g = block.activated(up, mixed.detach().flatten(0, 1))
        block.writer.add_lora_columns(g, seeds[2:])
        out = torch.addmm(x, g, block.writer.weight(x).T)

        ctx.block, ctx.context, ctx.shape = block, context, shape
        ctx.kept = (up, qkv, mixed) if keep else None
        # Copies of the spare columns: a view would keep all of the tensor it looks at.
        spare = [h[:, product.width :].clone() for h, product in zip(inputs, block.readers, strict=True)]
        ctx.save_for_backward(x, seeds, g[:, block.writer.width :].clone(), *spare)
        return out

    @staticmethod
    def backward(ctx, grad):
        block, (x, seeds, *spare) = ctx.block, ctx.saved_tensors
        inputs = block.normed(x)
        for columns, filled, product in zip(inputs, spare[1:], block.readers, strict=True):
            columns[:, product.width :] = filled
        weights = [product.weight(x) for product in block.readers]
        if ctx.kept is not None:
            up, qkv, mixed = ctx.kept
        else:
            up, qkv = block.read(inputs, weights)
            with torch.enable_grad():
                qkv = qkv.unflatten(0, ctx.shape).detach().requires_grad_()
                mixed = mix(qkv, block.attention, ctx.context)

        g = block.activated(up, mixed.detach().flatten(0, 1))
        g[:, block.writer.width :] = spare[0]
        grad_g, writer_adapters = block.writer.backward(g, grad, block.writer.weight(x), seeds[2:], True)
        del g

        grads = [x.new_empty(len(x), product.rows) for product in block.readers]
        grad_up, grad_qkv = [y[:, places] for y, product in zip(grads, block.readers, strict=True) for places in product.places]
        gelu_backward_into(up, grad_g[:, block.writer.columns[0]], grad_up)
        (change,) = torch.autograd.grad(mixed, qkv, grad_g[:, block.writer.columns[1]].unflatten(0, ctx.shape))
        grad_qkv.copy_(change.flatten(0, 1))
        del up, qkv, mixed, grad_g, change

        grad_x, reader_adapters = grad, []
        readers = zip(block.norms, block.readers, inputs, grads, weights, seeds_of(block, seeds), strict=True)
        for norm, product, h, y, weight, some in readers:
            grad_h, adapters = product.backward(h, y, weight, some, ctx.needs_input_grad[0])
            reader_adapters += adapters
            if grad_h is not None:
                grad_x = norm_backward(x, norm.weight, norm.eps, grad_h, grad_x)
        return grad_x if ctx.needs_input_grad[0] else None, None, None, None, None, *reader_adapters, *writer_adapters


def seeds_of(block: FusedBlock, seeds: Tensor) -> list[Tensor]:
    """The first two of the four seeds, shared out among the readers' linears."""
    return list(seeds[:2].split([len(product.linears) for product in block.readers]))


class ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies from hidden states (M, hidden_size) and labels (M,), with the logits of `chunk` tokens at a time."""

    @staticmethod
    def forward(ctx, hidden, head, labels, chunk):
        grad, loss = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            some = slice(start, start + chunk)
            logits = hidden[some] @ head.T                           # (chunk, vocab)
            loss += loss_and_gradient_(logits, labels[some])
            torch.mm(logits, head, out=grad[some])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None


def fused_loss(model: Falcon, batch, chunk: int = 2048) -> Tensor:
    """The pair of train.py's `answer_loss`: the sum over the learned tokens of their cross-entropies, in float32."""
    hidden = model.hidden_states(batch.input_ids, batch.attention_mask).flatten(0, 1)      # (batch * tokens, hidden_size)
    before = hidden.index_select(0, batch.learned - 1)                                     # (learned, hidden_size)
    return ChunkedLoss.apply(before, model.lm_head.weight, batch.labels.flatten()[batch.learned], chunk)


def fuse(model: Falcon, keep_bytes: int = 0) -> None:
    """Let the blocks of a Falcon with LoRA on all linears train by the functions above, in place.

    keep_bytes is the memory to spend on not computing again: as many blocks as fit keep their products, the last ones first, since their
    memory is free again when the backward comes to the others. Decoding with a cache goes on as before.
    """
    layers = model.transformer.h
    config = model.config
    if not config.parallel_attn or config.bias or config.hidden_dropout:
        raise ValueError(f"the fused block is for Falcons with parallel attention, no biases and no hidden dropout; this one has "
                         f"parallel_attn {config.parallel_attn}, bias {config.bias}, hidden_dropout {config.hidden_dropout}")
    bare = [name for name, linear in linears(layers).items() if not isinstance(linear, LoRALinear)]
    if bare:
        raise ValueError(f"the fused block wants LoRA on all linears of every block; without an adapter: transformer.h.{bare[0]}, ...")
    model.checkpointing = False                                      # a fused block has its own
    for index, block in enumerate(layers):
        block.forward = functools.partial(forward, block, FusedBlock(block), len(layers) - index, keep_bytes)


def forward(block: FalconBlock, fused: FusedBlock, from_the_end: int, keep_bytes: int, x: Tensor, context: Context) -> Tensor:
    if context.cache is not None:
        return FalconBlock.forward(block, x, context)
    flat = x.flatten(0, 1)
    keep = torch.is_grad_enabled() and from_the_end * flat.shape[0] * fused.kept_width * x.element_size() <= keep_bytes
    return FusedForward.apply(flat, fused, context, x.shape[:2], keep, *fused.adapters).view_as(x)
