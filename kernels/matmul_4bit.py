"""y = x · W^T with W in 4 bits, and its gradient: the product that every linear of the model runs on a GPU.

W is stored row by row in blocks of 64 values: w = code[4-bit index] * absmax[block], two indices a byte (nf4.py). absmax itself has 8 bits
and, in groups, a scale (double_quant.py): 0.52 byte a weight. LoRA (lora.py) adds a product of two thin matrices to the output.

The number of rows of x decides the way. A row is a token: one in a decode step, thousands in training.

1. **Few rows**: the time is that of reading W. The weight is decoded inside the product, so that its packed 0.52 byte a weight is all
   that moves. Three kernels share a page of arithmetic: `few_rows.py` in plain Triton says what is computed, for any shape and
   any device; `few_rows_mma.py` and `few_rows_wgmma.py` say it again in Gluon for the shapes that models have, with a Hopper GPU in
   mind, four to eight times faster.
2. **Many rows**: the time is that of multiplying, and cuBLAS multiplies better than any kernel that also decodes.
   `dequantize_4bit.py` writes W to a workspace in one launch, and cuBLAS reads it from there. The price is one pass over W whatever
   the rows, so its share shrinks as they grow.

The gradient of x, dY W, takes few_rows.py up to 16 rows and the workspace beyond. W itself is frozen; the bias and the two LoRA tensors
get their gradients.

**Where they cross**, ms a call in a CUDA graph over rotating weights, one H100 (up is 18176 x 4544, qkv 4672 x 4544; bfloat16, doubly
quantized; bold is what `fused_kernel` chooses):

    rows                      1            8            16           32           64           128
    up    few_rows_mma      **0.024**    **0.028**     0.035     (16 rows with M = 16)
          few_rows_wgmma     0.035                   **0.034**    **0.037**    **0.048**    **0.089**
          workspace          0.138                    0.138                     0.139
          cuBLAS, bf16 W     0.060                    0.061                     0.063        0.065
    qkv   few_rows_mma      **0.010**                  0.014
          few_rows_wgmma     0.013                   **0.013**    **0.014**    **0.017**    **0.029**
          workspace          0.034                    0.033                     0.034
          cuBLAS, bf16 W     0.018                    0.018                     0.018        0.019

Beyond 128 rows a second tile of x would decode W again and take another 0.089, where the workspace takes 0.14 to begin with.
The gradient of few rows is few_rows.py's, up / qkv: 0.088 / 0.028 at one row, 0.090 / 0.028 at 16. A workspace was 0.14 / 0.034.

**Between the crossing and a thousand rows** the workspace is the price: at 512 rows of up dequantization takes 0.078 ms, the product 0.116,
and one after the other 0.192, on an H100. To hide one behind the other was tried; us a call for 512 rows, one H200 (bf16: up 116, qkv 37):

                                                     up     down   qkv    dense
    dequantize, then multiply: this file             171    171    48.7   45.9
    in two halves of W, to find it in the cache      169    189    55.1   53.3
    and the second half dequantized on a stream      168    186    53.9   52.3     of higher priority, behind the first
    in four quarters, on two streams                 178    202    68.6   67.7

Nothing is hidden: cuBLAS's product takes all registers of a multiprocessor, so what runs beside it waits for it; and products of half
the size fill the GPU worse. (2048 rows: 533, 541, 524 for up in one, two, four pieces.) A product that decodes, at 128 rows a tile, takes
the 0.089 above four times.

**Why the operators are registered.** `torch.compile` cannot look into a Triton launch and does not have to: each operator below
comes with a fake implementation that says only what shape and type come out. One graph, no break.

**The workspace** comes from PyTorch's own allocator, at each call. That is what makes it safe: the allocator keeps a tensor to the
stream it was asked for on, and a CUDA graph under capture gets memory of its own. A buffer kept in a global would be shared
by streams that know nothing of each other.
"""

import torch
from torch import Tensor

from minqlora.kernels import few_rows, few_rows_mma, few_rows_wgmma
from minqlora.kernels.dequantize_4bit import dequantize_4bit

# Up to this many rows each kernel is used; the table above. few_rows_mma.py and few_rows.py take no more.
MMA_ROWS = few_rows_mma.ROWS_OF_X
WGMMA_ROWS = 128
PLAIN_ROWS = few_rows.BLOCK_M


def matmul_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    in_features: int,
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
    bias: Tensor | None = None,
    lora_xa: Tensor | None = None,
    lora_B: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y = x W^T + bias + scale * lora_xa lora_B^T, with W = dequant(packed): (..., in_features) -> (..., out_features).

    nested = (absmax2, offset, code2, blocksize2): then absmax holds its 8-bit codes, as double_quant.py makes them.
    lora_xa (..., rank) is x · lora_A^T; lora_B is (out_features, rank).
    """
    check(x, packed, absmax, out_features, in_features, blocksize, nested, bias, lora_xa, lora_B)
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 0)
    # Where nobody differentiates or compiles, the operator would only cost time, as much again as the launch.
    call = product if torch.is_grad_enabled() or torch.compiler.is_compiling() else run
    return call(
        x, packed, absmax, code, out_features, in_features, blocksize, absmax2, offset, code2, blocksize2, bias, lora_xa, lora_B, scale
    )


def check(x, packed, absmax, out_features, in_features, blocksize, nested, bias, lora_xa, lora_B) -> None:
    """What a caller can get wrong."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x has dtype {x.dtype}; the kernels compute in float32, float16 or bfloat16")
    if x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features = {in_features}")
    n = out_features * in_features
    if packed.numel() != (n + 1) // 2:
        raise ValueError(f"packed holds {packed.numel()} bytes; a {out_features} x {in_features} weight needs {(n + 1) // 2}")
    if absmax.numel() != -(-n // blocksize):
        raise ValueError(f"absmax holds {absmax.numel()} blocks; a {out_features} x {in_features} weight has {-(-n // blocksize)}")
    wanted = torch.float32 if nested is None else torch.uint8
    if absmax.dtype != wanted:
        raise ValueError(f"absmax has dtype {absmax.dtype}; {'without' if nested is None else 'with'} double quantization it is {wanted}")
    if nested is not None and nested[0].numel() != -(-absmax.numel() // nested[3]):
        raise ValueError(f"absmax2 holds {nested[0].numel()} scales; {absmax.numel()} blocks in groups of {nested[3]} have another number")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({out_features},)")
    if (lora_xa is None) != (lora_B is None):
        raise ValueError("lora_xa and lora_B come together; one of them is None")
    if lora_B is not None and (lora_B.shape[0] != out_features or lora_xa.shape != (*x.shape[:-1], lora_B.shape[1])):
        wanted = f"{(*x.shape[:-1], 'rank')} and {(out_features, 'rank')}"
        raise ValueError(f"lora_xa has shape {tuple(lora_xa.shape)} and lora_B {tuple(lora_B.shape)}; they must be {wanted}")


def run(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    in_features: int,
    blocksize: int,
    absmax2: Tensor | None,
    offset: Tensor | None,
    code2: Tensor | None,
    blocksize2: int,
    bias: Tensor | None,
    lora_xa: Tensor | None,
    lora_B: Tensor | None,
    scale: float,
) -> Tensor:
    nested = None if absmax2 is None else (absmax2, offset, code2, blocksize2)
    flat = x.reshape(-1, in_features)                              # (rows, in_features)
    xa = None if lora_xa is None else lora_xa.reshape(-1, lora_B.shape[1]).to(x.dtype).contiguous()         # (rows, rank)
    lora_B, bias = (None if t is None else t.contiguous() for t in (lora_B, bias))
    kernel = fused_kernel(flat, packed, out_features, blocksize)
    with torch.cuda.device_of(x):
        if kernel is not None:
            y = kernel.product(aligned(flat), packed, absmax, code, out_features, blocksize, nested, bias, xa, lora_B, scale)
        else:
            weight = dequantize_4bit(packed, absmax, (out_features, in_features), code, blocksize, x.dtype, nested)
            y = add_product(None if bias is None else bias.to(x.dtype), flat, weight, xa, lora_B, scale)
    return y.reshape(*x.shape[:-1], out_features)                  # (..., out_features)


product = torch.library.custom_op("minqlora::matmul_4bit", run, mutates_args=())


def add_product(bias, x, weight, xa, lora_B, scale) -> Tensor:
    """bias + scale xa lora_B^T + x W^T, all into one output. The small terms go first: what comes last is rounded once only."""
    begin, beta = (x.new_zeros(()), 0) if bias is None else (bias, 1)             # at a beta of 0 nobody reads `begin`
    if xa is None:
        return torch.addmm(begin, x, weight.T, beta=beta)
    y = torch.addmm(begin, xa, lora_B.to(x.dtype).T, beta=beta, alpha=scale)
    return y.addmm_(x, weight.T)


def fused_kernel(x: Tensor, packed: Tensor, out_features: int, blocksize: int):
    """The kernel that decodes the weight inside the product, or None where dequantizing it first is faster."""
    rows, in_features = x.shape
    # 512 columns are a step of few_rows_mma.py, 16 rows its tile. wgmma exists on Hopper (9.0) alone.
    whole = in_features % 64 == 0 and in_features >= 512 and out_features >= 16 and blocksize % 64 == 0 and packed.data_ptr() % 16 == 0
    if rows > 0 and whole and few_rows.has_table(x) and few_rows.capability(x.device)[0] == 9:
        return few_rows_mma if rows <= MMA_ROWS else few_rows_wgmma if rows <= WGMMA_ROWS else None
    return few_rows if is_plain(x, in_features, blocksize) else None


def is_plain(x: Tensor, in_features: int, blocksize: int) -> bool:
    """Whether few_rows.py multiplies x. On a GPU it would lose without its table; the interpreter has nothing to lose."""
    fast = few_rows.has_table(x) and few_rows.whole_blocks(in_features, blocksize)
    return 0 < x.shape[0] <= PLAIN_ROWS and in_features % 2 == 0 and (fast or not x.is_cuda)


def aligned(x: Tensor) -> Tensor:
    """x with its values side by side in each row, and rows that begin at multiples of 16 bytes if its width allows: for vector loads."""
    begins = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if x.stride(1) == 1 and (begins or x.shape[1] * x.element_size() % 16):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@product.register_fake
def _(x, packed, absmax, code, out_features, *rest):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("minqlora::matmul_4bit_grad", mutates_args=())
def product_grad(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    in_features: int,
    blocksize: int,
    absmax2: Tensor | None,
    offset: Tensor | None,
    code2: Tensor | None,
    blocksize2: int,
) -> Tensor:
    """dx = dy W: (..., out_features) -> (..., in_features)."""
    nested = None if absmax2 is None else (absmax2, offset, code2, blocksize2)
    flat = dy.reshape(-1, out_features)                            # (rows, out_features)
    with torch.cuda.device_of(dy):
        if is_plain(flat, in_features, blocksize):
            dx = few_rows.grad(aligned(flat), packed, absmax, code, in_features, blocksize, nested)
        else:
            dx = flat @ dequantize_4bit(packed, absmax, (out_features, in_features), code, blocksize, dy.dtype, nested)
    return dx.reshape(*dy.shape[:-1], in_features)                 # (..., in_features)


@product_grad.register_fake
def _(dy, packed, absmax, code, out_features, in_features, *rest):
    return dy.new_empty(*dy.shape[:-1], in_features)


def setup_context(ctx, inputs, output):
    _, packed, absmax, code, *sizes, absmax2, offset, code2, blocksize2, bias, lora_xa, lora_B, scale = inputs
    # Keep the 4-bit weight and decode it again: 0.52 byte a parameter that lies in the model anyway, not 2 more.
    ctx.save_for_backward(packed, absmax, code, absmax2, offset, code2, lora_xa, lora_B)
    ctx.sizes, ctx.blocksize2, ctx.scale, ctx.bias_dtype = sizes, blocksize2, scale, None if bias is None else bias.dtype


def backward(ctx, dy):
    packed, absmax, code, absmax2, offset, code2, lora_xa, lora_B = ctx.saved_tensors
    needed = dict(zip(("x", "bias", "lora_xa", "lora_B"), (ctx.needs_input_grad[i] for i in (0, 11, 12, 13)), strict=True))
    dx = dbias = dxa = dB = None
    if needed["x"]:
        dx = product_grad(dy, packed, absmax, code, *ctx.sizes, absmax2, offset, code2, ctx.blocksize2)
    if needed["bias"]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)        # (out_features,)
    if needed["lora_xa"]:
        dxa = (ctx.scale * (dy @ lora_B.to(dy.dtype))).to(lora_xa.dtype)                   # (..., rank)
    if needed["lora_B"]:
        dB = dy.reshape(-1, dy.shape[-1]).T @ lora_xa.reshape(-1, lora_xa.shape[-1]).to(dy.dtype)
        dB = (ctx.scale * dB).to(lora_B.dtype)                     # (out_features, rank)
    return dx, *[None] * 10, dbias, dxa, dB, None


product.register_autograd(backward, setup_context=setup_context)
