"""The 4-bit product and its gradients, against float64. On a CPU the kernels run in Triton's interpreter."""

import pytest
import torch

from minqlora.double_quant import DYNAMIC_MAP, double_dequantize, double_quantize
from minqlora.kernels import few_rows
from minqlora.kernels.matmul_4bit import PLAIN_ROWS, WGMMA_ROWS, matmul_4bit
from minqlora.nf4 import FP4, NF4, dequantize_4bit, quantize_4bit

MANY_ROWS = WGMMA_ROWS + 1 if torch.cuda.is_available() else PLAIN_ROWS + 1     # the first that are dequantized
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter has no product in bfloat16: on a GPU it is tested too.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


class Weight:
    """A random 4-bit weight: the tensors a kernel gets, and the float64 matrix they stand for."""

    def __init__(self, out_features, in_features, blocksize=64, nested=True, code=NF4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.out_features, self.in_features, self.blocksize = out_features, in_features, blocksize
        weight = 0.05 * torch.randn(out_features, in_features, generator=generator)
        packed, absmax = quantize_4bit(weight, code, blocksize)
        self.nested, stored = None, absmax
        if nested:
            stored, absmax2, offset = double_quantize(absmax)
            absmax = double_dequantize(stored, absmax2, offset)
            self.nested = (absmax2.to(DEVICE), offset.to(DEVICE), DYNAMIC_MAP.to(DEVICE), 256)
        self.exact = dequantize_4bit(packed, absmax, weight.shape, code, blocksize).double().to(DEVICE)
        self.packed, self.absmax, self.code = packed.to(DEVICE), stored.to(DEVICE), code.to(DEVICE)

    def arguments(self):
        return self.packed, self.absmax, self.code, self.out_features, self.in_features, self.blocksize, self.nested

    def product(self, x, *rest):
        return matmul_4bit(x, *self.arguments(), *rest)


def random(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def bound(a, b, dtype):
    """How far a · b in `dtype` may lie from the exact product, value by value.

    A weight is rounded to dtype once or twice (its level, and for some shapes level times absmax), a result once: u each,
    relative. A float32 sum of K terms in any order adds K roundings of 2^-24 of the sum of magnitudes.
    """
    u = torch.finfo(dtype).eps / 2
    magnitude = a.double().abs() @ b.double().abs()
    return (3 * u + a.shape[1] * 2**-24) * magnitude + torch.finfo(dtype).smallest_normal


def test_by_hand():
    # One block of 64 that starts with the levels 1, -1 and 0, at absmax 2: W = [2, -2, 0, 0, ...].
    packed = torch.full((32, 1), 0x77, dtype=torch.uint8)          # level 7 of NF4 is zero
    packed[0] = 0xF0                                               # level 15 is 1, level 0 is -1
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([3.0, 1.0, 5.0])
    y = matmul_4bit(x.to(DEVICE), packed.to(DEVICE), torch.tensor([2.0], device=DEVICE), NF4.to(DEVICE), 1, 64, 64)
    assert y.tolist() == [[2 * 3.0 - 2 * 1.0]]


# rows, out_features, in_features, blocksize: one row; ragged tiles; a K of whole blocks, of half a block, and of neither; blocks that
# cross rows; an odd K; many rows.
SHAPES = [
    (1, 5, 64, 64), (3, 70, 192, 64), (16, 33, 96, 64), (2, 16, 62, 64), (5, 64, 256, 128), (4, 70, 192, 128), (3, 9, 96, 32),
    (2, 7, 33, 64), (MANY_ROWS, 5, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [False, True])
def test_product_and_gradient_are_as_near_to_float64_as_the_dtype_allows(shape, dtype, nested):
    rows, out_features, in_features, blocksize = shape
    w = Weight(out_features, in_features, blocksize, nested)
    x = random(rows, in_features, dtype=dtype).requires_grad_()
    dy = random(rows, out_features, dtype=dtype, seed=2)
    y = w.product(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    assert ((y.double() - x.double() @ w.exact.T).abs() <= bound(x, w.exact.T, dtype)).all()
    assert ((dx.double() - dy.double() @ w.exact).abs() <= bound(dy, w.exact, dtype)).all()


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_bias_and_lora_enter_the_same_output_and_get_their_gradients(rows):
    w = Weight(20, 64)
    x, bias, xa, lora_B = random(rows, 64), random(20, seed=2), random(rows, 4, seed=3), random(20, 4, seed=4)
    dy = random(rows, 20, seed=5)
    inputs = [t.requires_grad_() for t in (x, bias, xa, lora_B)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = matmul_4bit(x, *w.arguments(), bias, xa, lora_B, 0.25)
    reference = exact[0] @ w.exact.T + exact[1] + 0.25 * exact[2] @ exact[3].T
    # The largest sum here has 64 + 4 + 1 terms of size about 1: some 70 roundings of 2^-24 of a magnitude below 20.
    tolerance = 70 * 20 * 2**-24
    torch.testing.assert_close(y.double(), reference, atol=tolerance, rtol=0)
    for got, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(reference, exact, dy.double()), strict=True):
        # Gradients of bias and lora_B add up `rows` terms of size about 1.
        torch.testing.assert_close(got.double(), wanted, atol=max(70, rows) * 20 * 2**-24, rtol=0)


@pytest.mark.parametrize("splits", [2, 3])
def test_splitting_the_sum_changes_roundings_only(splits):
    w = Weight(70, 256)
    x, dy = random(3, 256), random(3, 70, seed=2)
    bias = random(70, seed=3)
    y = few_rows.product(x, w.packed, w.absmax, w.code, 70, 64, w.nested, bias, None, None, 1.0, splits)
    dx = few_rows.grad(dy, w.packed, w.absmax, w.code, 256, 64, w.nested, splits)
    assert ((y.double() - bias - x.double() @ w.exact.T).abs() <= bound(x, w.exact.T, torch.float32) + 2**-22).all()
    assert ((dx.double() - dy.double() @ w.exact).abs() <= bound(dy, w.exact, torch.float32)).all()


def test_any_code_goes_in_as_an_argument():
    w = Weight(8, 64, code=FP4)
    x = random(2, 64)
    assert ((w.product(x).double() - x.double() @ w.exact.T).abs() <= bound(x, w.exact.T, torch.float32)).all()


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_x_may_be_strided_and_of_any_rank(rows):
    w = Weight(8, 64)
    x = random(rows, 2, 64)
    plain = w.product(x)
    apart = random(rows, 2, 80)[..., 8:72]
    apart.copy_(x)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    columns = x.transpose(-1, -2).contiguous().transpose(-1, -2)   # stride 2 * 64 between neighbours of a row
    for view in (apart, swapped, columns):
        assert torch.equal(w.product(view), plain)
    # Another number of rows may sum in another order: 64 products of size 0.05 and less, float32.
    torch.testing.assert_close(w.product(x[0, 0]), plain[0, 0], rtol=0, atol=64 * 64 * 0.05 * 2**-24)
    assert w.product(x[:0]).shape == (0, 2, 8)
    # sum() sends back a gradient whose strides are zero.
    x.requires_grad_()
    (dx,) = torch.autograd.grad(w.product(x).sum(), x)
    wanted = w.exact.sum(0).expand(rows, 2, 64)
    torch.testing.assert_close(dx.double(), wanted, atol=8 * 8 * 2**-24, rtol=0)


@pytest.mark.filterwarnings("ignore:Input #")                  # gradcheck would like float64
def test_gradcheck():
    # The map is linear in x, so a step of 0.01 has no error of its own; float32 results of size 1 carry 1e-7 / 0.01 = 1e-5 a rounding.
    w = Weight(3, 32, blocksize=32)
    x, bias, xa, lora_B = random(1, 32), random(3, seed=2), random(1, 2, seed=3), random(3, 2, seed=4)
    inputs = tuple(t.requires_grad_() for t in (x, bias, xa, lora_B))

    def f(x, bias, xa, lora_B):
        return matmul_4bit(x, *w.arguments(), bias, xa, lora_B, 0.5)

    assert torch.autograd.gradcheck(f, inputs, eps=1e-2, atol=1e-3)


@pytest.mark.parametrize("rows", [2, MANY_ROWS])
def test_the_operators_keep_what_pytorch_asks_of_operators(rows):
    w = Weight(6, 64)
    absmax2, offset, code2, blocksize2 = w.nested
    x, xa, lora_B = (t.requires_grad_() for t in (random(rows, 64), random(rows, 3, seed=3), random(6, 3, seed=4)))
    stored = (w.packed, w.absmax, w.code, 6, 64, 64, absmax2, offset, code2, blocksize2)
    torch.library.opcheck(torch.ops.minqlora.matmul_4bit, (x, *stored, None, xa, lora_B, 0.5))
    torch.library.opcheck(torch.ops.minqlora.matmul_4bit_grad, (random(rows, 6), *stored))


def test_only_the_packed_weight_is_kept_for_the_backward_pass():
    w = Weight(16, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        w.product(random(2, 64).requires_grad_())
    assert sum(t.numel() * t.element_size() for t in kept) < 16 * 64 + 2048    # under a byte a weight, and the two codes


def test_checkpointing_gives_the_same_gradient():
    w = Weight(16, 64)
    x = random(2, 64).requires_grad_()
    (plain,) = torch.autograd.grad(w.product(x).square().sum(), x)
    y = torch.utils.checkpoint.checkpoint(w.product, x, use_reentrant=False)
    (again,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(plain, again)


def test_what_does_not_fit_is_named():
    w = Weight(8, 64)
    with pytest.raises(ValueError, match="in_features = 64"):
        w.product(random(2, 32))
    with pytest.raises(ValueError, match="float64"):
        w.product(random(2, 64).double())
    with pytest.raises(ValueError, match="packed holds 256 bytes"):
        matmul_4bit(random(2, 64), w.packed, w.absmax, w.code, 9, 64, 64, w.nested)
    with pytest.raises(ValueError, match="absmax holds 8 blocks"):
        matmul_4bit(random(2, 64), w.packed, w.absmax, w.code, 8, 64, 32, w.nested)
    with pytest.raises(ValueError, match="come together"):
        w.product(random(2, 64), None, random(2, 4))
    with pytest.raises(ValueError, match="rank"):
        w.product(random(2, 64), None, random(2, 4), random(8, 5))
    with pytest.raises(ValueError, match=r"bias has shape \(7,\)"):
        w.product(random(2, 64), random(7))
    with pytest.raises(ValueError, match=r"absmax has dtype torch\.uint8; without double quantization it is torch\.float32"):
        matmul_4bit(random(2, 64), w.packed, w.absmax, w.code, 8, 64, 64)
    with pytest.raises(ValueError, match="absmax2 holds 1 scales; 8 blocks in groups of 4"):
        matmul_4bit(random(2, 64), w.packed, w.absmax, w.code, 8, 64, 64, (*w.nested[:3], 4))


def test_a_bias_may_be_a_column():
    w, bias = Weight(8, 64), random(8, 3)[:, 1]
    assert torch.equal(w.product(random(2, 64), bias), w.product(random(2, 64), bias.contiguous()))


# What only a GPU can run. rows, out_features, in_features, blocksize: each kernel at its first and last row, ragged tiles of W, a step that
# reaches back, an odd number of blocks, blocks of 128 that cross rows, and a W short and long enough to be split.
FUSED = [
    (1, 16, 512, 64), (3, 70, 576, 64), (8, 4544, 640, 64), (9, 100, 704, 128), (16, 70, 4544, 64), (2, 33, 18176, 64),
    (12, 48, 18176, 256), (17, 130, 576, 64), (32, 70, 4544, 64), (64, 257, 1088, 128), (100, 300, 576, 64), (WGMMA_ROWS, 4672, 4544, 64),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", FUSED)
@pytest.mark.parametrize("nested", [False, True])
def test_the_gluon_kernels_are_as_near_to_float64(shape, dtype, nested):
    rows, out_features, in_features, blocksize = shape
    w = Weight(out_features, in_features, blocksize, nested)
    x = random(rows, in_features, dtype=dtype)
    y = w.product(x)
    assert ((y.double() - x.double() @ w.exact.T).abs() <= bound(x, w.exact.T, dtype)).all()
    assert torch.equal(w.product(x), y)                            # sums in a fixed order: the same bits again


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_features", [32, 90, 256])                 # ragged or not, and too few columns for the Gluon kernels or not
@pytest.mark.parametrize("rank", [3, 256])
def test_the_pair_table_leaves_room_for_everything_else(dtype, in_features, rank):
    w = Weight(70, in_features)
    x, xa = random(3, in_features, dtype=dtype), random(3, rank, dtype=dtype, seed=3)
    lora_B = random(70, rank, dtype=dtype, seed=4)
    y = few_rows.product(x, w.packed, w.absmax, w.code, 70, 64, w.nested, None, xa, lora_B, 0.5)
    a, b = torch.cat([x.double(), 0.5 * xa.double()], 1), torch.cat([w.exact.T, lora_B.double().T])
    assert ((y.double() - a @ b).abs() <= bound(a, b, dtype)).all()
    dy = random(3, 70, dtype=dtype, seed=5)
    dx = few_rows.grad(dy, w.packed, w.absmax, w.code, in_features, 64, w.nested)
    assert ((dx.double() - dy.double() @ w.exact).abs() <= bound(dy, w.exact, dtype)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 128])
@pytest.mark.parametrize("rank", [3, 64, 200])
def test_the_gluon_kernels_add_bias_and_lora(rows, rank):
    w = Weight(150, 18176)                                         # long enough to be split
    dtype, scale = torch.bfloat16, 0.25
    x, bias, xa = random(rows, 18176, dtype=dtype), random(150, dtype=dtype, seed=2), random(rows, rank, dtype=dtype, seed=3)
    lora_B = random(150, rank, seed=4)
    y = matmul_4bit(x, *w.arguments(), bias, xa, lora_B, scale)
    # One product with the columns of all three side by side.
    a = torch.cat([x.double(), scale * xa.double(), torch.ones(rows, 1, device=DEVICE)], 1)
    b = torch.cat([w.exact.T, lora_B.double().T, bias.double()[None]])
    assert ((y.double() - a @ b).abs() <= bound(a, b, dtype)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 300])
def test_under_compile_there_is_no_graph_break(rows):
    w = Weight(256, 512)
    x = random(rows, 512, dtype=torch.bfloat16).requires_grad_()
    xa, lora_B = random(rows, 4, seed=3).requires_grad_(), random(256, 4, seed=4).requires_grad_()

    def f(x, xa, lora_B):
        return matmul_4bit(x * 2, *w.arguments(), None, xa, lora_B, 0.5).square().sum()

    eager, compiled = f(x, xa, lora_B), torch.compile(f, fullgraph=True)(x, xa, lora_B)
    for a, b in zip(torch.autograd.grad(eager, (x, xa, lora_B)), torch.autograd.grad(compiled, (x, xa, lora_B)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * a.abs().max().item())        # the squares and sums are fused in bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 300])
def test_in_a_cuda_graph_and_on_several_streams(rows):
    w = Weight(256, 18176)
    xs = [random(rows, 18176, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    wanted = [w.product(x) for x in xs]
    held = xs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = w.product(w.product(held)[:, :1] * 0 + held)         # one product after another
    for x, y in zip(xs, wanted, strict=True):
        held.copy_(x)
        graph.replay()
        assert torch.equal(out, y)
    streams = [torch.cuda.Stream() for _ in xs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = [None] * len(xs)
    for _ in range(20):
        for i, (stream, x) in enumerate(zip(streams, xs, strict=True)):
            with torch.cuda.stream(stream):
                got[i] = w.product(x)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 200])
def test_more_than_two_to_the_31_values(rows):
    out_features, in_features = 2**17 + 40, 2**14 + 64             # 2.16e9 weights
    n = out_features * in_features
    packed = torch.randint(0, 256, (n // 2, 1), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(n // 64, device=DEVICE)
    x = random(rows, in_features, dtype=torch.bfloat16)
    y = matmul_4bit(x, packed, absmax, NF4.to(DEVICE), out_features, in_features, 64)
    some = torch.tensor([0, 1, 2**16, 2**17 - 1, 2**17, out_features - 1], device=DEVICE)
    codes = packed.view(out_features, -1)[some].long()
    levels = NF4.double().to(DEVICE)
    exact = torch.stack((levels[codes >> 4], levels[codes & 15]), -1).view(len(some), -1, 64)
    exact = (exact * absmax.view(out_features, -1, 1)[some]).view(len(some), -1)
    assert ((y[:, some].double() - x.double() @ exact.T).abs() <= bound(x, exact.T, torch.bfloat16)).all()


@pytest.mark.gpu
def test_the_error_is_no_larger_than_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    functional = bitsandbytes.functional
    weight = random(4096, 4096, seed=5).bfloat16()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    pairs = torch.cartesian_prod(state.code.double(), state.code.double())[packed.view(-1).long()]
    exact = (pairs.view(-1, 64) * absmax.double()[:, None]).view(4096, 4096)
    nested = (state.state2.absmax, state.offset, state.state2.code, state.state2.blocksize)
    for rows in (1, 4, 64, 512):
        x = random(rows, 4096, dtype=torch.bfloat16)
        ours = matmul_4bit(x, packed, state.absmax, state.code, 4096, 4096, 64, nested)
        theirs = bitsandbytes.matmul_4bit(x, packed.t(), state)
        reference = x.double() @ exact.T
        # The same inputs, one sum each: a tenth more would be chance, not a better method.
        assert (ours.double() - reference).norm() <= 1.1 * (theirs.double() - reference).norm()
