"""kernels/quantize_4bit.py and the quantizing half of kernels/double_quant.py, against nf4.py, the definitions, and bitsandbytes on a GPU.

Where there is no GPU, the kernels run in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minqlora import nf4
from minqlora.double_quant import DYNAMIC_MAP
from minqlora.nf4 import FP4, FP4_E2M1, INT4, NF4

# The interpreter has to be on before these are imported: conftest.py sees to it.
from minqlora.kernels.double_quant import double_quantize  # isort: skip
from minqlora.kernels.quantize_4bit import bins, quantize_4bit, written_out  # isort: skip

# Zeros times 1/0, and NaN, are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The sign of zero, then powers of two: the widest range of exponents there is, with gaps of every size between midpoints.
E3M0 = torch.tensor([0, *(2.0**k for k in range(-3, 4)), 0, *(-(2.0**k) for k in range(-3, 4))]) / 8


def same(a, b):
    """Every bit, but for the payload of a NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32))


def weights(n, dtype, seed=0):
    """Normal values, and the blocks where arithmetic is awkward: zeros, subnormal numbers, NaN, infinity, one outlier."""
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if n >= 512:
        weight[:64] = 0
        if DEVICE == "cuda" or dtype != torch.bfloat16:            # the interpreter misreads subnormal bfloat16
            weight[64:128] *= 1e-40
        weight[200] = float("nan")
        weight[300] = float("inf")
        weight[400] = 1e4
    return weight.to(dtype).to(DEVICE)


def test_hand_example():
    # One block of 64: every level twice and in order, then zeros. 0.5 lies below the midpoint
    # 0.5017 of levels 12 and 13, and -0.5 below the midpoint -0.46 of levels 2 and 3.
    weight = torch.cat([NF4 * 3, torch.tensor([1.5, -1.5]), torch.zeros(46)])
    packed, absmax = quantize_4bit(weight.to(DEVICE), NF4, 64)
    assert absmax.tolist() == [3.0]
    assert packed.flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF, 0xC2] + [0x77] * 23


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 480, 2048, 8195])
def test_with_the_exact_reciprocal_every_bit_is_the_reference_s(n, dtype):
    weight = weights(n, dtype)
    for blocksize in (32, 64, 512, 4096):
        for code in (NF4, FP4, FP4_E2M1, INT4, E3M0):
            packed, absmax = quantize_4bit(weight, code, blocksize, exact_reciprocal=True)
            wanted_packed, wanted_absmax = nf4.quantize_4bit(weight.cpu(), code, blocksize)
            assert torch.equal(packed.cpu(), wanted_packed)
            assert same(absmax.cpu(), wanted_absmax)


@given(st.lists(st.floats(-1, 1, width=16), min_size=16, max_size=16), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_any_code_is_searched_as_the_reference_does_or_refused(levels, seed):
    code = torch.tensor(levels)
    try:
        bins(tuple(code.tolist()), True, torch.device("cpu"))
    except ValueError as error:
        assert "1023" in str(error)
        return
    # Values at midpoints and levels, one unit beside them, and anywhere.
    exact = torch.cat([code, (code.sort()[0][1:] + code.sort()[0][:-1]) / 2])
    weight = torch.cat([exact, exact.nextafter(torch.tensor(9.0)), exact.nextafter(torch.tensor(-9.0))])
    weight = torch.cat([weight, torch.rand(162, generator=torch.Generator().manual_seed(seed)) * 2 - 1, torch.ones(1)]).to(DEVICE)
    packed, _ = quantize_4bit(weight, code, 256, exact_reciprocal=True)
    assert torch.equal(packed.cpu(), nf4.quantize_4bit(weight.cpu(), code, 256)[0])


def test_midpoints_that_no_bins_separate_are_refused():
    with pytest.raises(ValueError, match="no 1023 bins separate"):
        bins((-1.0, *(i * 1e-5 for i in range(14)), 1.0), True, torch.device("cpu"))


# The numbers that the values are compared with in bitsandbytes' machine code for sm_90, read off with a disassembler. Nine-digit
# decimals name a float32.
IN_ITS_MACHINE_CODE = torch.tensor([
    -0.848096430, -0.610632896, -0.459995270, -0.339679420, -0.234607399, -0.137911737, -0.0455250181,
    0.0397901498, 0.120255254, 0.203521252, 0.292013764, 0.389312536, 0.501663387, 0.642786920, 0.861478388,
])  # fmt: skip


def test_the_midpoints_are_those_that_bitsandbytes_compares_with_on_cuda():
    midpoints = torch.tensor([written_out(midpoint) for midpoint in ((NF4[1:].double() + NF4[:-1]) / 2).tolist()])
    assert torch.equal(midpoints, IN_ITS_MACHINE_CODE)
    # Where the exact midpoint lies half-way between two floats, the reference rounds to the even one, and a decimal to either.
    difference = midpoints.view(torch.int32) - ((NF4[1:] + NF4[:-1]) / 2).view(torch.int32)
    assert sorted(difference.abs().tolist()) == [0] * 11 + [1] * 4


def test_a_tie_takes_the_lower_level():
    weight = torch.cat([torch.tensor([1.0]), IN_ITS_MACHINE_CODE, torch.zeros(48)]).to(DEVICE)         # absmax 1: scaled is exact
    codes = quantize_4bit(weight, NF4, 64)[0].flatten().cpu()
    assert torch.stack([codes >> 4, codes & 15], 1).flatten()[1:16].tolist() == list(range(15))


def test_a_block_of_zeros_or_subnormals_has_code_0_and_absmax_0():
    # Zeros times 1/0 is NaN, above no midpoint. Subnormal numbers count as zeros.
    packed, absmax = quantize_4bit(torch.tensor([0.0] * 64 + [1e-39] * 64, device=DEVICE), NF4, 64)
    assert packed.unique().tolist() == [0x00] and absmax.tolist() == [0, 0]


def test_a_nan_gets_code_0_and_leaves_its_block_alone():
    weight = torch.tensor([float("nan"), 1, -1, 0.5] * 16, device=DEVICE)
    packed, absmax = quantize_4bit(weight, NF4, 64)
    assert absmax.tolist() == [1]
    assert packed.flatten().tolist() == [0x0F, 0x0C] * 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_approximate_reciprocal_moves_a_value_by_one_level_at_most(dtype):
    weight = torch.randn(2**14, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, absmax = quantize_4bit(weight.to(DEVICE), NF4, 64)
    wanted, wanted_absmax = nf4.quantize_4bit(weight, NF4, 64)
    assert torch.equal(absmax.cpu(), wanted_absmax)
    # The reciprocal is off by one unit in the last place at most, 2^-23 relative: only a value that close to a midpoint can move.
    # The 15 midpoints cover 15 * 2^-23 of the 2 that [-1, 1] is long on either side: of 16 384 values 0.03 move on average.
    difference = (packed.cpu().int() - wanted.int()).abs()
    assert set(difference.unique().tolist()) <= {0, 1, 16}
    assert (difference != 0).sum() <= 3


def test_strided_empty_and_float64_weights():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantize_4bit(weight.T.to(DEVICE), NF4, 64)[0], quantize_4bit(weight.T.contiguous().to(DEVICE), NF4, 64)[0])
    assert torch.equal(quantize_4bit(weight.double().to(DEVICE), NF4, 64)[0], quantize_4bit(weight.to(DEVICE), NF4, 64)[0])
    packed, absmax = quantize_4bit(torch.empty(0, 64, device=DEVICE), NF4, 64)
    assert packed.shape == (0, 1) and absmax.shape == (0,)


def test_the_operators_are_registered_and_compile_without_a_break():
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    torch.library.opcheck(torch.ops.minqlora.quantize_4bit.default, (weight, NF4, 64, False))
    absmax, code2 = torch.rand(300).to(DEVICE), DYNAMIC_MAP.to(DEVICE)
    torch.library.opcheck(torch.ops.minqlora.double_quantize.default, (absmax, code2, 256))

    def both(weight, code2):
        packed, absmax = quantize_4bit(weight, NF4, 64)
        return packed, *double_quantize(absmax, code2, 256)

    for ours, eager in zip(torch.compile(both, backend="aot_eager", fullgraph=True)(weight, code2), both(weight, code2), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("blocksize", [64, 256, 2048])
def test_double_quantization_takes_the_nearest_level(n, blocksize):
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 3 + 0.01
    codes, absmax2, offset = (x.cpu() for x in double_quantize(absmax.to(DEVICE), DYNAMIC_MAP.to(DEVICE), blocksize))
    assert offset == absmax.to(DEVICE).mean()
    groups = torch.nn.functional.pad(absmax - offset, (0, -n % blocksize)).view(-1, blocksize)
    assert torch.equal(absmax2, groups.abs().amax(dim=1))
    if n == 1:                                                     # it is its own mean: 0 times 1/0
        assert codes.tolist() == [0]
        return
    x = (groups * (1 / absmax2)[:, None]).double().view(-1)[:n]
    distance = (x - DYNAMIC_MAP.double()[codes.int()]).abs()
    nearest = (x[:, None] - DYNAMIC_MAP.double()).abs().amin(dim=1)
    # x is rounded twice after the reciprocal, and the midpoint once: a few units in the last place of 1 decide between two neighbours.
    assert (distance <= nearest + 4 * 2**-23).all()


def test_a_tie_stays_where_the_search_ended_on_an_even_code():
    midpoints = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2
    # 0, 2, 1 + m and 1 - m have the mean 1, and absmax2 is 1: the scaled values are m and -m themselves. Multiples of 2^-22 below 4 are
    # added without a rounding, in any order.
    usable = [m for m in midpoints.tolist() if m * 2**22 % 1 == 0 and abs(m) < 1]
    assert len(usable) >= 10
    for m in usable:
        absmax = torch.tensor([0, 2, 1 + m, 1 - m], device=DEVICE)
        codes, absmax2, offset = double_quantize(absmax, DYNAMIC_MAP.to(DEVICE), 256)
        assert offset == 1 and absmax2 == 1
        below = int((midpoints < m).sum())                         # m lies between this level and the next
        assert codes[2] == below + below % 2


# --- On a GPU -------------------------------------------------------------------------------------------------------------------------


def distributions(n, generator):
    """Random weights of several kinds: normal, of a fine-tuned size, uniform, heavy-tailed, on a grid (ties), sparse, subnormal."""
    normal = torch.randn(n, generator=generator, device="cuda")
    yield "normal", normal
    yield "small", normal * 0.02
    yield "uniform", torch.rand(n, generator=generator, device="cuda") * 2 - 1
    yield "cubed", normal**3
    yield "grid", (normal * 8).round() / 8
    yield "sparse", torch.where(torch.rand(n, generator=generator, device="cuda") < 0.9, 0.0, normal)
    yield "subnormal", normal * 1e-38
    yield "largest", normal.clamp(-3, 3) * 1e38


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_bitsandbytes_on_cuda(dtype, blocksize):
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator("cuda").manual_seed(blocksize)
    for name, weight in distributions(2**22 + 37, generator):
        weight = weight.to(dtype)
        wanted, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
        packed, absmax = quantize_4bit(weight, NF4, blocksize)
        assert torch.equal(packed, wanted), name
        assert same(absmax, state.absmax), name


@pytest.mark.gpu
def test_a_billion_values_have_the_bytes_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    values = 0
    for name, weight in distributions(2**27 + 37, torch.Generator("cuda").manual_seed(0)):
        wanted, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        packed, absmax = quantize_4bit(weight, NF4, 64)
        assert torch.equal(packed, wanted), f"{name}: {(packed != wanted).sum()} bytes differ"
        assert same(absmax, state.absmax), name
        values += weight.numel()
    assert values > 10**9


@pytest.mark.gpu
def test_ties_nan_and_infinity_are_bitsandbytes_too():
    functional = pytest.importorskip("bitsandbytes.functional")
    midpoints = IN_ITS_MACHINE_CODE
    around = torch.cat([midpoints, midpoints.nextafter(torch.tensor(9.0)), midpoints.nextafter(torch.tensor(-9.0))])
    block = torch.cat([torch.ones(1), around, torch.zeros(18)])    # (64,)
    blocks = [block * 2.0**k for k in range(-20, 20)] + [block * 1.1**k for k in range(100)]
    for special in (float("nan"), float("inf"), -float("inf"), 1e-39, -1e-39, 3.4e38):
        blocks += [torch.cat([torch.tensor([special]), block[1:]]), torch.full((64,), special)]
    weight = torch.cat(blocks).cuda()
    wanted, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, absmax = quantize_4bit(weight, NF4, 64)
    assert torch.equal(packed, wanted) and same(absmax, state.absmax)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 100, 256 * 1000, 1290515])
def test_double_quantization_is_bitsandbytes_on_cuda(n):
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator("cuda").manual_seed(n)
    normal = torch.randn(n, 64, generator=generator, device="cuda")
    for absmax in (torch.rand(n, generator=generator, device="cuda"), normal.abs().amax(1) * 0.02):
        codes, absmax2, offset = double_quantize(absmax, DYNAMIC_MAP.cuda(), 256)
        mean = absmax.mean()
        wanted, state = functional.quantize_blockwise(absmax - mean, blocksize=256)
        assert torch.equal(codes, wanted) and torch.equal(absmax2, state.absmax) and offset == mean


@pytest.mark.gpu
def test_more_than_2_to_the_31_values():
    n = 2**31 + 64 * 1000 + 17                                     # 4.3 GB in float16
    weight = torch.empty(n, dtype=torch.float16, device="cuda")
    for start in range(0, n, 2**28):
        weight[start : start + 2**28].normal_()
    packed, absmax = quantize_4bit(weight, NF4, 64)
    tail = 64 * 5000
    start = (n - tail) // 64 * 64
    wanted, wanted_absmax = quantize_4bit(weight[start:], NF4, 64)
    assert torch.equal(packed[start // 2 :], wanted) and torch.equal(absmax[start // 64 :], wanted_absmax)


@pytest.mark.gpu
def test_it_runs_on_the_stream_and_in_the_graph_it_is_called_in():
    weight = torch.randn(4096, 640, device="cuda")
    wanted = quantize_4bit(weight, NF4, 64)
    still = torch.zeros_like(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed, absmax = quantize_4bit(still, NF4, 64)
    still.copy_(weight)
    graph.replay()
    assert torch.equal(packed, wanted[0]) and torch.equal(absmax, wanted[1])
