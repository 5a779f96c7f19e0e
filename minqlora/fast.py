"""14. The same block for training on a GPU, in fewer and larger steps. (`fast_loss.py` does it for the loss.)

`falcon.py` and `lora.py` are the definition. They waste a GPU's time in two places, and here is their fast version: a hand-written
forward and backward of a whole parallel block, installed over a Falcon by `fuse(model)` and tested equal to it.

**LoRA and the linears** are as few matrix products as they can be: `fast_product.py`. In its words a block has one or two *readers*, the
projection up and query_key_value, which read the norm or a norm each, and one *writer*, the projection down and dense, which add into x.

**Recomputing a whole block computes what nobody reads.** W is frozen, so the backward of a linear is one product, dy W, as its
forward is; computing a block again makes three. But a backward wants a linear's *input*, never its output. So when only x is kept, the
products down and dense, half of the block, need not be done again: a step costs 2.5 forward passes and not 3. What is small and dear is
kept beside x: x A^T of all four linears, 4 * rank values a token. Where memory is left over (`keep_bytes`), the last blocks keep their
products and their attention too, and recompute norm and GELU alone: 2 forward passes. What is then still left over keeps weights
dequantized, which otherwise costs writing and reading 2 bytes a weight in the forward and again in the backward.

The backward reuses memory: GELU's overwrites up with g, and dg with d up; d qkv is written beside d up, so that one product reads both.
This destroys what was kept. A second backward of the same block (retain_graph) therefore computes everything again.

On a CPU every step is PyTorch's own function; on a GPU what stands between the products is in `kernels/`: norm, GELU, rotary positions and
dropout. Nothing is left to torch.compile, which would compile anew for each shape that a batch has.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora.falcon import Context, Falcon, FalconAttention, FalconBlock
from minqlora.fast_product import Product, drops, slices
from minqlora.lora import LoRALinear, linears


def norm_into(x: Tensor, norm: nn.LayerNorm, out: Tensor) -> None:
    """out = norm(x), for out that may be columns of a wider matrix."""
    if x.is_cuda:
        from minqlora.kernels.layer_norm import norm_into as kernel

        kernel(x, norm.weight, norm.bias, norm.eps, out)
    else:
        out.copy_(norm(x))


def norm_backward(x: Tensor, norm: nn.LayerNorm, grad: Tensor, onto: Tensor) -> Tensor:
    """onto + the gradient of x, from that of norm(x)."""
    if x.is_cuda:
        from minqlora.kernels.layer_norm import norm_backward as kernel

        return kernel(x, norm.weight, norm.eps, grad, onto)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return onto + torch.autograd.grad(norm(x), x, grad)[0]


def gelu_into(u: Tensor, out: Tensor) -> None:
    if u.is_cuda:
        from minqlora.kernels.gelu import gelu_into as kernel

        kernel(u, out)
    else:
        out.copy_(F.gelu(u))


def gelu_backward_(u: Tensor, grad: Tensor, dxa: Tensor | None, A: Tensor | None) -> None:
    """Add dxa A, LoRA's part, to grad, the gradient of g = gelu(u); turn it into that of u; and leave g in u."""
    if u.is_cuda:
        from minqlora.kernels.gelu import gelu_backward_ as kernel

        return kernel(u, grad, dxa, A)
    if A is not None:
        grad += dxa @ A
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        g = F.gelu(leaf)
        grad.copy_(torch.autograd.grad(g, leaf, grad)[0])
    u.copy_(g.detach())


def copy_into(source: Tensor, out: Tensor) -> None:
    """out = source (M, N), one of them some columns of a wider matrix."""
    if source.is_cuda:
        from minqlora.kernels.copy_columns import copy_columns

        copy_columns(source, out)
    else:
        out.copy_(source)


class Attended:
    """Attention between the products, forward and backward: qkv (M, qkv_features), a row a token -> output (M, hidden_size).

    shape is (batch, tokens), M = batch * tokens.
    """

    def __init__(self, attention: FalconAttention, qkv: Tensor, shape: torch.Size, context: Context, keep: bool):
        self.attention, self.shape, self.context = attention, shape, context
        if qkv.is_cuda:
            from minqlora.kernels.rotary import turn

            query, key = turn(qkv, context.rotary, attention.kv_heads, attention.head_dim)
            value = qkv.unflatten(-1, (attention.kv_heads, -1, attention.head_dim))[:, :, -1]     # (M, kv_heads, head_dim), a view
            # (batch, heads or kv_heads, tokens, head_dim); keys and values then for every head.
            query, key, value = (x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
            read = query, attention.for_every_head(key), attention.for_every_head(value)
            if shape[1] == 1:
                read = tuple(x.contiguous() for x in read)           # see FalconAttention.mix_one
        else:
            read = (qkv.unflatten(0, shape),)
        with torch.set_grad_enabled(keep):
            # What is read starts a graph of its own. Not detach: it would share the counter by which autograd knows that a tensor was
            # overwritten, and `up`, in the same matrix, will be.
            self.read = [x.data.requires_grad_() for x in read]
            if qkv.is_cuda:
                mixed = F.scaled_dot_product_attention(*self.read, attn_mask=context.mask, is_causal=context.mask is None)
                self.mixed = mixed.transpose(1, 2)                   # (batch, tokens, heads, head_dim)
            else:
                self.mixed = attention.mix(*self.read, context)      # (batch, tokens, hidden_size)

    @property
    def output(self) -> Tensor:
        return self.mixed.detach().flatten(0, 1).flatten(1)

    def backward_into(self, grad: Tensor, out: Tensor) -> None:
        """The gradient of qkv into out, columns of a wider matrix, from that of the output. Once.

        grad may overlap with out: it has been read before anything is written.
        """
        # Contiguous: given a strided one, for grouped keys, cuDNN's backward in torch 2.11 is off by 100 %.
        contiguous = grad.new_empty(grad.shape)
        copy_into(grad, contiguous)
        changes = torch.autograd.grad(self.mixed, self.read, contiguous.view(self.mixed.shape))
        self.mixed = self.read = None
        if out.is_cuda:
            from minqlora.kernels.rotary import turn_back

            turn_back(*changes, self.context.rotary, self.attention.kv_heads, out)
        else:
            out.copy_(changes[0].flatten(0, 1))


class FusedBlock:
    """A parallel FalconBlock in three steps: norm and the linears behind it, attention, and the linears that add into x."""

    def __init__(self, block: FalconBlock):
        self.attention = block.self_attention
        up, down = block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h
        qkv, dense = block.self_attention.query_key_value, block.self_attention.dense
        # up before qkv in either case: the order of seeds, adapters and gradients.
        if block.config.num_ln_in_parallel_attn == 2:
            self.norms, self.readers = [block.ln_mlp, block.ln_attn], [Product([up], True), Product([qkv], True)]
        else:
            self.norms, self.readers = [block.input_layernorm], [Product([up, qkv], True)]
        # Where there are two norms, weights are the largest tensors there are (40b, 180B): no two of them at a time.
        self.writer = Product([down, dense], False, apart=len(self.norms) == 2)
        self.seeds = [slice(0, 2)] if len(self.readers) == 1 else [slice(0, 1), slice(1, 2)]    # the readers' among the four
        self.adapters = [matrix for linear in (up, qkv, down, dense) for matrix in (linear.lora_A, linear.lora_B)]
        # What a kept block holds a token: up and qkv, the mixed values, and the turned queries, keys and values that attention's own
        # backward reads. Where several heads share one of several keys, those are repeated for each head.
        attention, heads = self.attention, block.config.num_attention_heads
        repeated = 1 < attention.kv_heads < heads
        read = 3 * heads * attention.head_dim if repeated else qkv.out_features
        self.kept_width = up.out_features + qkv.out_features + dense.in_features + read
        self.products = [*self.readers, self.writer]
        self.weight_numel = sum(product.rows * product.full_width for product in self.products)

    def dropout_rates(self) -> tuple[float, ...]:
        """Of up, qkv, down and dense, as they drop now."""
        linears = [linear for product in self.products for linear in product.linears]
        return tuple(linear.dropout if drops(linear) else 0.0 for linear in linears)

    def normed(self, x: Tensor) -> list[Tensor]:
        """norm(x) for each reader, (M, full_width), with the spare columns still to fill."""
        inputs = []
        for norm, product in zip(self.norms, self.readers, strict=True):
            inputs.append(x.new_empty(len(x), product.full_width))
            norm_into(x, norm, inputs[-1][:, : product.width])
        return inputs

    def up_and_qkv(self, inputs: list[Tensor], weight: Tensor | None = None) -> list[Tensor]:
        """[up (M, ffn), qkv (M, qkv_features)]; where there are two norms, one weight at a time."""
        outputs = [h @ (product.weight(h) if weight is None else weight).T for h, product in zip(inputs, self.readers, strict=True)]
        return [y[:, places] for y, product in zip(outputs, self.readers, strict=True) for places in product.places]


class FusedForward(torch.autograd.Function):
    """x + attention(norm x) + mlp(norm x) for x (M, hidden_size), M = batch * tokens. The adapters are arguments to receive gradients."""

    @staticmethod
    def forward(ctx, x, block, context, shape, keep, *adapters):
        # Seeds (4,) of dropout for up, qkv, down, dense, drawn on x's device: the host does not wait for them.
        writer, seeds = block.writer, torch.randint(2**31, (4,), device=x.device)
        inputs = block.normed(x)
        for h, product, some in zip(inputs, block.readers, block.seeds, strict=True):
            product.add_lora_columns(h, seeds[some])
        up, qkv = block.up_and_qkv(inputs)
        attended = Attended(block.attention, qkv, shape, context, keep)
        g = x.new_empty(len(x), writer.full_width)
        gelu_into(up, g[:, writer.columns[0]])
        copy_into(attended.output, g[:, writer.columns[1]])
        writer.add_lora_columns(g, seeds[2:])
        out = writer.onto(x, g)

        ctx.block, ctx.context, ctx.shape, ctx.dropped = block, context, shape, block.dropout_rates()
        ctx.kept = (up, attended) if keep else None
        # Copies of the spare columns: a view would keep all of the matrix it looks at. The adapters are saved so that autograd notices
        # if they change before the backward.
        spare = [h[:, product.width :].clone() for h, product in zip(inputs, block.readers, strict=True)]
        ctx.save_for_backward(x, seeds, g[:, writer.width :].clone(), *spare, *adapters)
        return out

    @staticmethod
    def backward(ctx, grad):
        block, (x, seeds, writer_xa, *saved) = ctx.block, ctx.saved_tensors
        readers, writer = block.readers, block.writer
        readers_xa = saved[: len(readers)]
        if ctx.dropped != block.dropout_rates():
            raise RuntimeError("the model changed between train() and eval(), or its dropout, between a forward and its backward")
        # One matrix holds first [dg | da | dxa of down | dxa of dense], then [d up | d qkv].
        up_rows, rows = readers[0].places[0].stop, sum(product.rows for product in readers)
        matrix = x.new_empty(len(x), max(writer.full_width, rows))
        wide = matrix[:, : writer.full_width]
        writer.back_into(grad, wide)                                 # before the readers' weights are there: one workspace at a time

        inputs = block.normed(x)
        for h, xa, product in zip(inputs, readers_xa, readers, strict=True):
            h[:, product.width :] = xa
        # A single weight is wanted twice, below again. Two take turns, and are dequantized twice: they would be the largest tensors here.
        weight = readers[0].weight(x) if len(readers) == 1 else None
        if ctx.kept is not None:
            (up, attended), ctx.kept = ctx.kept, None
        else:
            up, qkv = block.up_and_qkv(inputs, weight)
            attended = Attended(block.attention, qkv, ctx.shape, ctx.context, keep=True)

        first, second = writer.columns
        # With dropout dxa A is dropped before it is added, which GELU's kernel does not do.
        if drops(writer.linears[0]):
            writer.add_lora_gradient_(wide, 0, seeds[2])
            gelu_backward_(up, wide[:, first], None, None)
        else:
            gelu_backward_(up, wide[:, first], writer.dxa(wide, 0), writer.linears[0].lora_A.to(x.dtype))
        g = up                                                       # what gelu_backward_ left in its place
        writer.add_lora_gradient_(wide, 1, seeds[3])
        writer_adapters = writer.adapter_gradients([g, attended.output], writer_xa, wide, [grad, grad], seeds[2:])
        up = g = qkv = None                                          # their memory is wanted below
        attended.backward_into(wide[:, second], matrix[:, up_rows:rows])

        grad_x, reader_adapters = grad, []
        parts = slices([product.rows for product in readers])        # of [d up | d qkv]
        for norm, product, h, part, some in zip(block.norms, readers, inputs, parts, block.seeds, strict=True):
            grad_y = matrix[:, part]
            # The first block's input is the embedding, which is frozen: only the spare columns' gradient is wanted.
            start = 0 if ctx.needs_input_grad[0] else product.width
            wide_h = x.new_empty(len(x), product.full_width)
            torch.mm(grad_y, (product.weight(x) if weight is None else weight)[:, start:], out=wide_h[:, start:])
            hs = [h[:, : product.width]] * len(product.linears)
            grads = [grad_y[:, places] for places in product.places]
            reader_adapters += product.adapter_gradients(hs, h[:, product.width :], wide_h, grads, seeds[some])
            if start == 0:
                product.add_lora_gradients_(wide_h, seeds[some])
                grad_x = norm_backward(x, norm, wide_h[:, : product.width], grad_x)
        return grad_x if ctx.needs_input_grad[0] else None, None, None, None, None, *reader_adapters, *writer_adapters


def fuse(model: Falcon, keep_bytes: int = 0, tokens: int | None = None) -> list[FusedBlock]:
    """Let the blocks of a Falcon with LoRA on all linears train by the functions above, in place.

    keep_bytes is the memory to spend on not computing again: as many blocks as fit keep their products, the last ones first, since their
    memory is free again when the backward comes to the others. The last block always keeps its own: its backward, the first,
    would need as much. If `tokens`, the most that a batch has, is given and the products of all blocks do not use up keep_bytes, the rest
    keeps weights as they are multiplied: dequantized once, for as many blocks as fit. Decoding with a cache goes on as before.
    Returns the FusedBlocks.

    The linears are taken as they stand: whoever replaces one afterwards (merge_lora), or changes the values of a base, undoes it first, by
    `del block.forward`. ValueError for a model that these functions do not cover.
    """
    layers, config = model.transformer.h, model.config
    if not config.parallel_attn or config.bias or config.hidden_dropout or (config.alibi and config.attention_dropout):
        raise ValueError(f"the fused block is for Falcons with parallel attention, no biases, and dropout in LoRA alone; this one has "
                         f"parallel_attn {config.parallel_attn}, bias {config.bias}, hidden_dropout {config.hidden_dropout}, "
                         f"attention_dropout {config.attention_dropout}")
    bare = [name for name, linear in linears(layers).items() if not isinstance(linear, LoRALinear)]
    if bare:
        raise ValueError(f"the fused block wants LoRA on all linears of every block; without an adapter: transformer.h.{bare[0]}, ...")
    loose = [name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(("lora_A", "lora_B"))]
    if loose:
        raise ValueError(f"the fused block and loss train adapters alone, and {loose[0]} requires a gradient too")
    model.checkpointing = False                                      # a fused block has its own
    blocks = [FusedBlock(block) for block in layers]
    like = model.transformer.word_embeddings.weight
    for block in blocks[: weights_kept(blocks, keep_bytes, tokens, like.element_size())]:
        for product in block.products:
            product.kept_weight = product.dequantized(like)
    for index, (block, fused) in enumerate(zip(layers, blocks, strict=True)):
        block.forward = functools.partial(forward, block, fused, len(layers) - index, keep_bytes)
    return blocks


def weights_kept(blocks: list[FusedBlock], keep_bytes: int, tokens: int | None, itemsize: int) -> int:
    """In how many blocks the weights stay dequantized.

    The products come first: for a byte they save some five times as much (Falcon-7B, 16 x 512 on an H100: 68 ms for 17 GB; the weights
    12 ms for 14).
    """
    left = 0 if tokens is None else keep_bytes - len(blocks) * tokens * blocks[0].kept_width * itemsize
    return min(len(blocks), max(0, left) // (blocks[0].weight_numel * itemsize))


def forward(block: FalconBlock, fused: FusedBlock, from_the_end: int, keep_bytes: int, x: Tensor, context: Context) -> Tensor:
    if context.cache is not None:
        return FalconBlock.forward(block, x, context)
    flat = x.flatten(0, 1)
    fits = from_the_end * flat.shape[0] * fused.kept_width * x.element_size() <= keep_bytes
    keep = torch.is_grad_enabled() and (fits or from_the_end == 1)
    return FusedForward.apply(flat, fused, context, x.shape[:2], keep, *fused.adapters).view_as(x)
