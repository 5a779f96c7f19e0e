"""AdamW8bit against bitsandbytes byte for byte, PagedAdamW against torch's AdamW bit for bit, and what both must survive.

Byte for byte needs the same roundings. torch's CPU loops round a multiply-add once where a vector register is full and may round it
twice in a tail, so the oracle's tensors have a multiple of 32 values here, and one thread; the ragged test gives the oracle the
padding that ours adds itself.
"""

import copy
import io
import math

import pytest
import torch
from torch import nn

import minqlora.optim as optim
from minqlora.optim import AdamW8bit, PagedAdamW, dequantize_8bit, dynamic_map, grid_table, make_optimizer, quantize_8bit

EPS = torch.finfo(torch.float32).eps                                       # 2^-23, one spacing at 1; a rounding is off by half of it
SHAPES = [(64, 96), (157, 32), (13,), (4096,), (64, 64, 2), (4064,), (128, 300), (3,)]   # ragged last blocks, and four below 4096 values


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(dtype=torch.float32, shapes=SHAPES, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).mul(0.1).to(device, dtype)) for shape in shapes]


def gradient(p, t, seed=1):
    """Gradients of step t: they span many orders of magnitude within a block, and their scale changes from step to step."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    values = torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** 4 * 10.0 ** (-(t % 5))
    return values.to(p.device, p.dtype)


def train(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = gradient(p, t, seed=i)
        optimizer.step()


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


# The maps and the 8-bit rounding --------------------------------------------------------------------------------------------------------

def test_the_maps_have_256_levels_in_seven_decades():
    signed, unsigned = dynamic_map(signed=True), dynamic_map(signed=False)
    for levels in (signed, unsigned):
        assert levels.shape == (256,) and (levels.diff() > 0).all() and levels[-1] == 1
    # 2^0 + ... + 2^6 = 127 midpoints of each sign, zero and one; without a sign 2^1 + ... + 2^7 = 254, zero and one.
    assert signed[127] == 0 and torch.equal(signed[:127], -signed[128:255].flip(0))
    assert unsigned[0] == 0
    # The lowest decade is one interval, [1e-7, 1e-6], or two; the highest is [0.1, 1] in 64, or 128.
    torch.testing.assert_close(signed[128], torch.tensor(5.5e-7), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(unsigned[1:3], torch.tensor([3.25e-7, 7.75e-7]), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(signed[254], torch.tensor(1 - 0.45 / 64), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(unsigned[254], torch.tensor(1 - 0.45 / 128), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_no_point_of_the_grid_lies_midway_between_two_levels(signed):
    # So "nearest" needs no rule for ties. In float64 both the distances and their comparison are exact enough to tell.
    levels = dynamic_map(signed).double()
    grid = (torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1).double()
    distance, index = (grid[:, None] - levels).abs().topk(2, largest=False, dim=1)
    assert (distance[:, 0] < distance[:, 1]).all()
    assert torch.equal(index[:, 0].to(torch.uint8), grid_table(dynamic_map(signed)))


def test_a_block_by_hand():
    table = grid_table(dynamic_map(signed=True))
    values = torch.zeros(512)
    values[:3] = torch.tensor([4.0, -4.0, 2.0])
    codes, absmax = quantize_8bit(values, table)
    assert absmax.tolist() == [4, 0]
    # 4 is the level 1. -1 is none: the lowest is -0.993. 0.5 lies in [0.1, 1] of 64 parts: (0.5 - 0.1) / (0.9 / 64) = 28.4, so part 28.
    assert codes[:3].tolist() == [255, 0, 255 - 64 + 28]
    # Zero falls on the grid point 32768 / 65535 * 2 - 1 = 1.53e-5. [1e-5, 1e-4] has four parts of 2.25e-5, so its first level is
    # 2.125e-5, which is nearer than the last level below 1e-5, 0.775e-5.
    torch.testing.assert_close(dynamic_map(signed=True)[codes[3:256].int()], torch.full((253,), 2.125e-5), rtol=4 * EPS, atol=0)
    # A block of zeros gets code 0 and scale 0, which is zero again.
    assert (codes[256:] == 0).all()
    assert (dequantize_8bit(codes, absmax, dynamic_map(signed=True))[256:] == 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_error_is_the_least_possible_up_to_one_grid_step(signed):
    levels, values = dynamic_map(signed), torch.randn(256 * 200) ** 3
    values = values if signed else values.abs()
    codes, absmax = quantize_8bit(values, grid_table(levels))
    scaled = values.view(-1, 256) / absmax[:, None]
    error = (levels[codes.int()].view(-1, 256) - scaled).abs()
    least = (scaled[..., None] - levels).abs().amin(dim=-1)
    # The grid's points are 2 / 65535 apart, so one, g, lies within 1 / 65535 of x. The level nearest to g is no farther from g than the
    # level nearest to x, so by the triangle inequality, twice, error <= least + 2 |x - g|. Roundings of numbers up to 2 add 8 eps.
    assert (error <= least + 2 / 65535 + 8 * EPS).all()
    assert (error > least + 8 * EPS).any()                                 # and it is not the nearest level everywhere


@pytest.mark.parametrize("signed", [True, False])
def test_a_million_codes_equal_those_of_bitsandbytes(signed):
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    levels = dynamic_map(signed)
    compared = 0
    for power, scale in ((1, 1.0), (3, 1e4), (4, 1e-12), (2, 1e-30)):
        values = torch.randn(256 * 1000) ** power * scale
        values = values if signed else values.abs()
        values[256 * 5: 256 * 6] = 0
        codes, absmax = quantize_8bit(values, grid_table(levels))
        theirs, state = bitsandbytes.quantize_blockwise(values, levels, blocksize=256)
        assert torch.equal(codes, theirs) and torch.equal(absmax, state.absmax)
        assert torch.equal(dequantize_8bit(codes, absmax, levels), bitsandbytes.dequantize_blockwise(theirs, state))
        compared += codes.numel()
    assert compared > 1_000_000


# AdamW8bit ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_states_and_parameters_equal_those_of_bitsandbytes(dtype, decay):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, lr, steps = parameters(dtype), 1e-3, 15
    theirs, start = copies(ours), copies(ours)
    mine = AdamW8bit(ours, lr=lr, weight_decay=decay)
    reference = bitsandbytes.optim.AdamW8bit(theirs, lr=lr, weight_decay=decay)
    compared = 0
    for t in range(steps):
        train(mine, ours, 1, t)
        train(reference, theirs, 1, t)
        for a, b in zip(ours, theirs, strict=True):
            for key, value in mine.state[a].items():
                if key != "step":
                    assert torch.equal(value, reference.state[b][key]), (t, tuple(a.shape), key)
                    compared += value.numel()
    assert compared == steps * sum(2 * p.numel() + 2 * math.ceil(p.numel() / 256) * (p.numel() >= 4096) for p in ours)
    for a, b, p in zip(ours, theirs, start, strict=True):
        if a.numel() >= 4096:
            assert torch.equal(a, b)
        else:
            # bitsandbytes' 32-bit update is the same formula in another order, m / (sqrt(v) + eps c) * (lr c / c1). Each order rounds the
            # update some 4 times and the parameter once. |m / sqrt(v)| corrected is at most sqrt of the steps (Cauchy-Schwarz, loosely).
            # In 16 bits the one spacing at which the two may then round apart is 2^-8 of the parameter.
            largest = p.abs().max() + steps * lr * steps**0.5
            each = largest * torch.finfo(dtype).eps + 8 * EPS * lr * steps**0.5
            assert (a - b).abs().max() <= steps * each


def test_a_ragged_parameter_is_one_padded_with_zeros():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    n, whole = 77 * 101, 31 * 256                                          # 7777 values, 97 in the last block
    ours = parameters(shapes=[(77, 101)])
    theirs = [nn.Parameter(torch.cat([ours[0].detach().flatten(), torch.zeros(whole - n)]))]
    mine, reference = AdamW8bit(ours, lr=1e-3), bitsandbytes.optim.AdamW8bit(theirs, lr=1e-3, weight_decay=0.0)
    for t in range(8):
        ours[0].grad = gradient(ours[0], t)
        theirs[0].grad = torch.cat([ours[0].grad.flatten(), torch.zeros(whole - n)])
        mine.step()
        reference.step()
        a, b = mine.state[ours[0]], reference.state[theirs[0]]
        assert torch.equal(a["state1"].flatten(), b["state1"][:n]) and torch.equal(a["state2"].flatten(), b["state2"][:n])
        assert torch.equal(a["absmax1"], b["absmax1"]) and torch.equal(a["absmax2"], b["absmax2"])
        assert torch.equal(ours[0].flatten(), theirs[0][:n])


def test_the_first_step_is_that_of_adamw():
    # Zero is exact in 8 bits, so nothing was lost yet: m / sqrt(v) = sign(g), up to the roundings of two orders of arithmetic.
    ours, lr = parameters(), 1e-3
    exact = copies(ours)
    train(AdamW8bit(ours, lr=lr), ours, 1)
    train(torch.optim.AdamW(exact, lr=lr, weight_decay=0.0), exact, 1)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= EPS * a.abs().max() + 16 * EPS * lr


def test_buckets_change_nothing(monkeypatch):
    small, large = parameters(), parameters()
    monkeypatch.setattr(optim, "CPU_BUCKET", 10_000)                       # less than one of the parameters, which is then alone
    train(AdamW8bit(small, weight_decay=0.01), small, 4)
    monkeypatch.setattr(optim, "CPU_BUCKET", 10_000_000)
    train(AdamW8bit(large, weight_decay=0.01), large, 4)
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


def test_states_take_two_bytes_and_two_scales_a_block():
    params = parameters(shapes=[(64, 4544), (100, 77)])                    # an adapter of falcon-7b; 7700 values, ragged
    optimizer = AdamW8bit(params)
    for p, expected in zip(params, (2 * 64 * 4544 + 2 * 4 * 1136, 2 * 7700 + 2 * 4 * 31), strict=True):
        assert sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_and_does_no_other_harm(bad):
    params = parameters(shapes=[(4096,), (4096,)])
    optimizer = AdamW8bit(params)
    for p in params:
        p.grad = gradient(p, 0)
    params[0].grad[7] = bad
    optimizer.step()
    optimizer.step()
    assert not torch.isfinite(params[0]).all()
    assert torch.isfinite(params[1]).all() and torch.isfinite(params[0][256:]).all()


# PagedAdamW -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("page", [2**22, 10_000])
def test_paged_is_torchs_adamw_on_a_cpu(decay, page):
    ours = parameters()
    theirs = copies(ours)
    mine, reference = PagedAdamW(ours, lr=1e-3, weight_decay=decay, page=page), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=decay)
    train(mine, ours, 6)
    train(reference, theirs, 6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(mine.state[a][key], reference.state[b][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_bfloat16_parameters_are_rounded_once_a_step():
    ours = parameters(torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in ours]
    mine, reference = PagedAdamW(ours, lr=1e-3), torch.optim.AdamW(exact, lr=1e-3, weight_decay=0.0)
    for t in range(6):
        train(mine, ours, 1, t)
        for a, b in zip(ours, exact, strict=True):
            b.grad = a.grad.float()
        reference.step()
        with torch.no_grad():
            for a, b in zip(ours, exact, strict=True):
                b.copy_(b.bfloat16())                                      # to nearest even
                assert torch.equal(a.float(), b)
                assert mine.state[a]["exp_avg_sq"].dtype == torch.float32


def test_sixteen_bits_cannot_hold_the_second_moment():
    # 0.999 v is less than half a spacing (2^-9 v at most) below v, and rounds back to it. With a zero gradient v must fall to 0.999^100.
    stuck, falls = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2))
    pairs = ((stuck, torch.optim.AdamW([stuck], weight_decay=0.0)), (falls, make_optimizer([falls], "paged")))
    for p, optimizer in pairs:
        p.grad = torch.ones_like(p)
        optimizer.step()
        first = optimizer.state[p]["exp_avg_sq"].clone()
        p.grad.zero_()
        for _ in range(100):
            optimizer.step()
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], first) == (p is stuck)
    torch.testing.assert_close(optimizer.state[falls]["exp_avg_sq"], first * 0.999**100, rtol=200 * EPS, atol=0)
    with pytest.raises(ValueError, match="second moment"):
        make_optimizer([stuck], "adamw")


# All of them ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_run_resumed_from_disk_continues_as_if_never_stopped(name):
    straight, resumed = parameters(), parameters()
    train(make_optimizer(straight, name), straight, 8)
    first = make_optimizer(resumed, name, lr=2e-4)
    train(first, resumed, 5)
    disk = io.BytesIO()
    torch.save(first.state_dict(), disk)
    disk.seek(0)
    second = make_optimizer(resumed, name, lr=1.0)                         # the saved learning rate wins
    second.load_state_dict(torch.load(disk, weights_only=True))
    train(second, resumed, 3, start=5)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("name", ["adamw8bit", "paged"])
def test_loading_bfloat16_adapters_casts_no_state(name):
    params = parameters(torch.bfloat16)
    optimizer = make_optimizer(params, name)
    train(optimizer, params, 3)
    fresh = make_optimizer(params, name)
    fresh.load_state_dict(optimizer.state_dict())
    for p in params:
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                assert fresh.state[p][key].dtype == value.dtype and torch.equal(fresh.state[p][key], value)
                assert fresh.state[p][key].data_ptr() != value.data_ptr()


def test_a_paged_run_may_go_on_with_adamw_and_back():
    a = parameters()
    paged = make_optimizer(a, "paged")
    train(paged, a, 2)
    b = copies(a)
    plain = make_optimizer(b, "adamw")
    plain.load_state_dict(copy.deepcopy(paged.state_dict()))               # torch's AdamW would share the tensors
    train(paged, a, 2, start=2)
    train(plain, b, 2, start=2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    make_optimizer(b, "paged").load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_parameter_without_a_gradient_rests(name):
    params = parameters(shapes=[(4096,), (8192,), (64,)])
    optimizer = make_optimizer(params, name)
    train(optimizer, params, 2)
    before = params[1].detach().clone()
    for p in params:
        p.grad = gradient(p, 2)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 3]
    train(optimizer, params, 1, start=3)                                   # steps differ among neighbours now
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 3, 4]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_closure_is_evaluated_with_gradients(name):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer([p], name)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5
    assert p[0] < 1 and p[1] > -2


def test_what_a_user_can_get_wrong_is_said():
    p = nn.Parameter(torch.zeros(4096))
    with pytest.raises(ValueError, match="'sgd' is not one of adamw, adamw8bit, paged"):
        make_optimizer([p], "sgd")
    with pytest.raises(ValueError, match="none requires a gradient"):
        make_optimizer([nn.Parameter(torch.zeros(2), requires_grad=False)])
    for name in ("adamw8bit", "paged"):
        with pytest.raises(ValueError, match=r"lr -1"):
            make_optimizer([p], name, lr=-1.0)
        with pytest.raises(ValueError, match=r"betas \(0.9, 1.0\)"):
            make_optimizer([p], name, betas=(0.9, 1.0))
    saved = make_optimizer([p], "adamw8bit").state_dict()
    with pytest.raises(ValueError, match="resume with the optimizer"):
        make_optimizer([p], "paged").load_state_dict(saved)
    with pytest.raises(ValueError, match="1 parameters in 1 groups, this one 2 in 1"):
        make_optimizer([p, nn.Parameter(torch.zeros(3))], "adamw8bit").load_state_dict(saved)


# On a GPU -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_on_a_gpu_follows_adamw(dtype):
    # 40 parameters in pages of three at most: both windows are used over and over, with nothing waiting for the device in between.
    ours = parameters(dtype, shapes=[(64, 512)] * 40 + [(7, 33)], device="cuda")
    exact = [nn.Parameter(p.detach().float()) for p in ours]
    lr, steps = 1e-3, 10
    mine = PagedAdamW(ours, lr=lr, weight_decay=0.1, page=100_000)
    reference = torch.optim.AdamW(exact, lr=lr, weight_decay=0.1, fused=True)
    assert len(mine.pages) == 14
    for t in range(steps):
        for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
            a.grad = gradient(a, t, seed=i)
            b.grad = a.grad.float()
        mine.step()
        reference.step()
        if dtype == torch.bfloat16:
            for b in exact:
                b.data.copy_(b.data.bfloat16())
    mine.synchronize()
    for a, b in zip(ours, exact, strict=True):
        state, other = mine.state[a], reference.state[b]
        assert not state["exp_avg"].is_cuda and state["exp_avg"].is_pinned()
        # The moments are sums of as many terms as steps, each product and sum rounded once on either side.
        for key in ("exp_avg", "exp_avg_sq"):
            bound = 4 * steps * EPS * other[key].abs().max().item()
            assert (state[key] - other[key].cpu()).abs().max().item() <= bound
        # Both sides round the update some 4 times and the parameter once a step; rounding to 16 bits may then differ by a spacing.
        each = b.abs().max() * torch.finfo(dtype).eps + 8 * EPS * lr * steps**0.5
        assert (a.float() - b).abs().max() <= steps * each


@pytest.mark.gpu
def test_paged_states_take_two_windows_of_the_gpu():
    params = parameters(shapes=[(64, 4096)] * 16, device="cuda")           # 4.2 million parameters: 32 MiB of moments
    for p in params:
        p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    optimizer = PagedAdamW(params, page=2**19)
    # Two windows of 2^19 values, two moments, 4 bytes: 8 MiB. Beside them one step count a parameter, 512 bytes by the allocator.
    assert torch.cuda.memory_allocated() - before <= 2 * 2 * 4 * 2**19 + 512 * len(params)
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 2 * 2 * 4 * 2**19 + 2 * 512 * len(params)


@pytest.mark.gpu
def test_a_paged_run_resumes_on_a_gpu():
    straight, resumed = (parameters(shapes=[(64, 512)] * 6, device="cuda") for _ in range(2))
    train(PagedAdamW(straight, page=70_000), straight, 6)
    first = PagedAdamW(resumed, page=70_000)
    train(first, resumed, 3)
    second = PagedAdamW(resumed, page=40_000)
    second.load_state_dict(first.state_dict())
    train(second, resumed, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.gpu
def test_8bit_on_a_gpu_follows_the_cpu():
    here = parameters(shapes=[(64, 96), (100, 77), (13,)])
    there = [nn.Parameter(p.detach().cuda()) for p in here]
    lr = 1e-3
    mine, other = AdamW8bit(here, lr=lr), AdamW8bit(there, lr=lr)
    for t in range(3):
        # Each step starts from the same states, so that one differing code cannot grow.
        other.load_state_dict(mine.state_dict())
        for i, (a, b) in enumerate(zip(here, there, strict=True)):
            b.data.copy_(a.data)
            a.grad = gradient(a, t, seed=i)
            b.grad = a.grad.cuda()
        mine.step()
        other.step()
        for a, b in zip(here, there, strict=True):
            assert (a - b.cpu()).abs().max() <= EPS * a.abs().max() + 16 * EPS * 4 * lr
            for moment in "12":
                x, y = mine.state[a][f"state{moment}"], other.state[b][f"state{moment}"].cpu()
                if x.dtype == torch.uint8:
                    # A moment that rounds differently in its last bit may fall on the next grid point, so on the next level.
                    assert (x.int() - y.int()).abs().max() <= 1 and (x != y).float().mean() < 1e-3
                    torch.testing.assert_close(mine.state[a][f"absmax{moment}"], other.state[b][f"absmax{moment}"].cpu(),
                                               rtol=4 * EPS, atol=0)
