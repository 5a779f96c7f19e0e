"""linear4bit.py: the product and its gradient, what is kept, what a cast may touch, and the state dict."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minqlora.double_quant import DYNAMIC_MAP
from minqlora.linear4bit import Linear4bit
from minqlora.nf4 import FP4, FP4_E2M1, INT4, NF4, dequantize_4bit, quantize_4bit

both_ways = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"


def some_layer(out_features=48, in_features=80, bias=True, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    return Linear4bit.from_weight(weight, torch.randn(out_features, generator=generator) if bias else None, **options)


def some_x(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_linear_layer_with_the_dequantized_weight(double_quant, dtype):
    layer = some_layer(double_quant=double_quant)
    x, same_x = some_x(2, 5, 80, dtype=dtype), some_x(2, 5, 80, dtype=dtype)
    y = layer(x)
    expected = F.linear(same_x, layer.dequantize(dtype)) + layer.bias.to(dtype)
    assert y.dtype == dtype and torch.equal(y, expected)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(grad)
    expected.backward(grad)
    assert x.grad.dtype == dtype
    # The same product of the same numbers; a matrix library may add them up in another order, in float32: 48 terms, 48 roundings.
    scale = grad.float().abs() @ layer.dequantize().abs()
    assert ((x.grad - same_x.grad).abs() <= (48 * 2**-24 + torch.finfo(dtype).eps) * scale).all()


@both_ways
@pytest.mark.parametrize("code", [NF4, FP4, FP4_E2M1, INT4], ids=["nf4", "fp4", "fp4_e2m1", "int4"])
def test_any_code_and_block_size(code, double_quant):
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(3))     # 2310 values: a ragged block
    layer = Linear4bit.from_weight(weight, code=code, blocksize=128, double_quant=double_quant)
    single = dequantize_4bit(*quantize_4bit(weight, code, 128), weight.shape, code, 128)
    if double_quant:
        # Absmax in 8 bits is off by half a step of 0.9/64, and half a point of 65535, of the largest difference from the mean.
        absmax = quantize_4bit(weight, code, 128)[1]
        bound = (0.9 / 128 + 1e-4) * (absmax - absmax.mean()).abs().max()
        assert ((layer.dequantize() - single).abs() <= bound).all()
    else:
        assert torch.equal(layer.dequantize(), single)


def test_a_second_product_is_added_where_it_is_given():
    layer, x = some_layer(), some_x(3, 80)
    xa, B = torch.randn(3, 4, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    y = layer(x, xa, B)
    # Four terms more in a sum of 80, in float32.
    torch.testing.assert_close(y, layer(x) + xa @ B.T, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(xa.grad, B.detach().sum(0).expand(3, 4))


@both_ways
def test_gradcheck(double_quant):
    layer = some_layer(12, 7, double_quant=double_quant)
    x = some_x(2, 3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_a_trainable_bias_gets_its_gradient():
    layer = some_layer()
    layer.bias.requires_grad_()
    layer(some_x(4, 3, 80)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 12.0))


@both_ways
def test_only_what_the_layer_stores_is_kept_for_the_backward(double_quant):
    layer = some_layer(256, 256, double_quant=double_quant)
    x, kept = some_x(4, 256), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    own = {tensor.data_ptr() for tensor in (*layer.parameters(), layer.code)}
    assert kept and {tensor.data_ptr() for tensor in kept} <= own
    # All of it, and not even x: under 0.6 byte a parameter.
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) < 0.6 * 256 * 256


def test_activation_checkpointing_gives_the_same_gradient():
    layer, x, same_x = some_layer(), some_x(4, 80), some_x(4, 80)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    layer(same_x).square().sum().backward()
    assert torch.equal(x.grad, same_x.grad)


def test_autocast_computes_in_bf16_and_the_gradient_comes_back_in_float32():
    layer, x = some_layer(), some_x(4, 80)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


@both_ways
@pytest.mark.parametrize(
    "cast",
    [
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.half(),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.double(),
        lambda layer: layer.type(torch.float16),
        lambda layer: torch.nn.Sequential(layer).to(torch.bfloat16)[0],
    ],
    ids=["to", "half", "bfloat16", "double", "type", "inside another"],
)
def test_a_cast_changes_the_bias_and_nothing_of_the_weight(cast, double_quant):
    layer = some_layer(double_quant=double_quant)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    weight = layer.dequantize()
    assert cast(layer) is layer
    assert layer.bias.dtype != torch.float32
    for name, parameter in layer.named_parameters():
        if name != "bias":
            assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])
    assert layer.code.dtype == torch.float32
    assert torch.equal(layer.dequantize(), weight)


def test_what_is_stored_are_frozen_parameters_and_no_buffers():
    layer = some_layer()
    shapes = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "weight": ((48 * 80 // 2, 1), torch.uint8),
        "absmax": ((60,), torch.uint8),
        "nested_absmax": ((1,), torch.float32),
        "nested_offset": ((1,), torch.float32),
        "bias": ((48,), torch.float32),
    }
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not list(layer.buffers())


@both_ways
def test_bits_a_parameter_are_what_is_stored(double_quant):
    layer = some_layer(1024, 1024, bias=False, double_quant=double_quant)
    stored = 8 * sum(p.numel() * p.element_size() for p in layer.parameters()) / 1024**2
    # 4 + 32/64, or 4 + 8/64 + 32/(64 * 256) and one offset.
    assert stored == (4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2 if double_quant else 4.5)
    assert f"{stored:.3f} bits a parameter" in repr(layer)


@both_ways
def test_a_copy_and_a_pickle_are_the_same_layer_and_share_nothing(double_quant):
    layer, x = some_layer(double_quant=double_quant), some_x(3, 80)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        other.absmax.zero_()
        assert not torch.equal(other(x), layer(x))


def test_the_constants_do_not_change_with_a_copy():
    layer = some_layer()
    copy.deepcopy(layer).code.zero_()
    assert NF4[0] == -1 and torch.equal(layer.code, NF4) and torch.equal(layer.code2, DYNAMIC_MAP)


@both_ways
def test_it_can_be_built_on_meta_and_filled(double_quant):
    layer, x = some_layer(double_quant=double_quant), some_x(3, 80)
    with torch.device("meta"):
        assigned = Linear4bit(80, 48, True, double_quant=double_quant)
        emptied = Linear4bit(80, 48, True, double_quant=double_quant)
    assert all(parameter.is_meta for parameter in assigned.parameters())
    assert assigned.state_dict().keys() == layer.state_dict().keys()
    assigned.load_state_dict(layer.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(layer.state_dict())
    for other in (assigned, emptied):
        assert torch.equal(other(x), layer(x))
        assert not any(parameter.requires_grad for parameter in other.parameters())


@both_ways
def test_it_compiles_into_one_graph(double_quant):
    layer = some_layer(double_quant=double_quant)
    x, same_x = some_x(3, 80), some_x(3, 80)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(same_x))
    y.sum().backward()
    layer(same_x).sum().backward()
    assert torch.equal(x.grad, same_x.grad)


@both_ways
def test_the_state_dict_has_bitsandbytes_names_and_comes_back(double_quant):
    layer, x = some_layer(double_quant=double_quant), some_x(3, 80)
    state = torch.nn.ModuleDict({"deep": layer}).state_dict()
    nested = {"deep.weight.nested_absmax", "deep.weight.nested_quant_map"} if double_quant else set()
    assert state.keys() == {"deep.weight", "deep.weight.absmax", "deep.weight.quant_map", f"deep.{QUANT_STATE}", "deep.bias"} | nested
    described = json.loads(bytes(state[f"deep.{QUANT_STATE}"].tolist()))
    fields = ["quant_type", "blocksize", "dtype", "shape"] + ["nested_blocksize", "nested_dtype", "nested_offset"] * double_quant
    assert list(described) == fields
    assert described["shape"] == [48, 80] and described["dtype"] == "float32"
    if double_quant:
        assert described["nested_offset"] == layer.nested_offset.item()

    fresh = torch.nn.ModuleDict({"deep": Linear4bit(80, 48, True, double_quant=double_quant)})
    fresh.load_state_dict(state)
    assert torch.equal(fresh["deep"](x), layer(x))


def test_a_state_dict_of_another_layer_is_refused_by_what_differs():
    layer = some_layer()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"weight\.absmax is torch\.uint8, and this layer's is torch\.float32"):
        Linear4bit(80, 48, True, double_quant=False).load_state_dict(state)
    with pytest.raises(RuntimeError, match="blocksize is 64, and this layer's is 128"):
        Linear4bit(80, 48, True, blocksize=128).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"shape is \[48, 80\], and this layer's is \[80, 48\]"):
        Linear4bit(48, 80, True).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight\.quant_map holds other levels"):
        Linear4bit(80, 48, True, code=FP4).load_state_dict(state)
    for key in state:
        with pytest.raises(RuntimeError, match="Missing key") as raised:
            Linear4bit(80, 48, True).load_state_dict({name: value for name, value in state.items() if name != key})
        assert f'"{key}"' in str(raised.value)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight\.other"'):
        Linear4bit(80, 48, True).load_state_dict(state | {"weight.other": torch.zeros(1)})


def test_what_is_no_weight_is_said():
    with pytest.raises(ValueError, match=r"weight has shape \(80,\); a linear layer's is \(out_features, in_features\)"):
        Linear4bit.from_weight(torch.randn(80))
    with pytest.raises(ValueError, match="absmax holds 1 values that are NaN"):
        Linear4bit.from_weight(torch.full((2, 32), float("nan")))
    with pytest.raises(ValueError, match="blocksize is 0"):
        Linear4bit(80, 48, blocksize=0)


@pytest.mark.gpu
@both_ways
def test_on_a_gpu_it_is_the_same_layer(double_quant):
    layer = some_layer(256, 512, double_quant=double_quant)
    x, cpu_x = some_x(3, 512).detach().cuda().requires_grad_(), some_x(3, 512)
    weight, y = layer.dequantize(), layer(cpu_x)
    y.sum().backward()
    layer.cuda()
    assert layer.code.is_cuda and torch.equal(layer.dequantize().cpu(), weight)
    on_gpu = layer(x)
    on_gpu.sum().backward()
    # Sums of 512 and 256 products in another order, of factors that TF32 may have rounded to 11 bits.
    for ours, theirs, terms in ((on_gpu, y, cpu_x.detach().abs() @ weight.abs().T), (x.grad, cpu_x.grad, weight.abs().sum(0))):
        assert ((ours.cpu() - theirs).abs() <= 2**-9 * terms).all()
