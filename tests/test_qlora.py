"""qlora.py: which layers, what is frozen, honest counts, and a merge that adds to the dequantized weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minqlora.linear4bit import Linear4bit
from minqlora.lora import LoRALinear, adapters
from minqlora.nf4 import FP4
from minqlora.qlora import add_lora, block_linears, count_parameters, merge_lora, quantize_linears


class SubclassedLinear(nn.Linear):
    """As in transformers' Falcon, whose linear layers are not of the type nn.Linear itself."""


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = SubclassedLinear(width, 4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width=32, blocks=2, vocab=40):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.h = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


def some_model(seed=0):
    torch.manual_seed(seed)
    return Model()


def some_ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


def trained(model):
    """Adapters as training leaves them: not zero."""
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.05)
    return model


ALL = ["h.0.up", "h.0.down", "h.1.up", "h.1.down"]


def test_the_linears_of_a_block_are_all_of_them_and_neither_head_nor_embedding():
    model = some_model()
    assert list(block_linears(model)) == ALL
    add_lora(quantize_linears(model), rank=2, alpha=1)
    assert list(block_linears(model)) == ALL


def test_a_model_with_adapters_is_not_quantized_without_a_word():
    with pytest.raises(ValueError, match="the model has adapters, on 4 layers; quantize it before add_lora"):
        quantize_linears(add_lora(some_model(), rank=2))


def test_every_linear_of_every_block_is_quantized_and_nothing_else():
    model, ids = some_model(), some_ids(2, 7)
    expected = {name: Linear4bit.from_weight(layer.weight, layer.bias).dequantize() for name, layer in block_linears(model).items()}
    assert quantize_linears(model) is model
    for name, layer in block_linears(model).items():
        assert type(layer) is Linear4bit
        assert torch.equal(layer.dequantize(), expected[name])
    assert type(model.lm_head) is nn.Linear and model.embed.weight.dtype == torch.float32
    assert model.h[0].up.bias is not None and model.h[0].down.bias is None
    assert model(ids).isfinite().all()


def test_the_code_and_its_options_are_passed_on():
    model = quantize_linears(some_model(), code=FP4, blocksize=128, double_quant=False)
    for layer in block_linears(model).values():
        assert torch.equal(layer.code, FP4) and layer.blocksize == 128 and layer.absmax.dtype == torch.float32


@pytest.mark.parametrize("quantize", [True, False])
def test_only_adapters_are_trained_and_they_reach_every_block(quantize):
    model = some_model()
    before = {name: p.detach().clone() for name, p in (quantize_linears(model) if quantize else model).named_parameters()}
    assert add_lora(model, rank=4, alpha=8, dropout=0.0) is model
    trained(model)
    model(some_ids(2, 7)).square().mean().backward()
    for name, parameter in model.named_parameters():
        part = name.rpartition(".")[2]
        assert parameter.requires_grad == (part in ("lora_A", "lora_B"))
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name
    assert list(adapters(model)) == ALL
    for name, value in before.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        assert torch.equal(getattr(module.base if isinstance(module, LoRALinear) else module, leaf), value)


def test_new_adapters_change_nothing_yet_and_follow_the_seed():
    ids = some_ids(2, 7)
    model = quantize_linears(some_model()).train()
    expected = model(ids)
    torch.manual_seed(3)
    add_lora(model, rank=4, alpha=8, dropout=0.5)
    assert torch.equal(model(ids), expected)
    for seed in (3, 4):
        other = some_model()
        torch.manual_seed(seed)
        add_lora(other, rank=4, alpha=8)
        assert torch.equal(other.h[1].down.lora_A, model.h[1].down.lora_A) == (seed == 3)


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("all", ALL),
        (["up"], ["h.0.up", "h.1.up"]),
        ("down", ["h.0.down", "h.1.down"]),
        (["h.1.up", "down"], ["h.0.down", "h.1.up", "h.1.down"]),
        (["1.up"], ["h.1.up"]),
    ],
    ids=str,
)
def test_targets_choose_layers_by_the_end_of_their_names(targets, chosen):
    assert list(adapters(add_lora(some_model(), rank=2, alpha=1, targets=targets))) == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1}, "dropout is 1"),
        ({"targets": ["up", "query", "p"]}, r"targets \['query', 'p'\] match no linear layer of a block; the model has down, up"),
        ({"targets": ["lm_head"]}, r"targets \['lm_head'\] match no linear layer of a block"),
        ({"targets": []}, r"targets \[\] match no linear layer"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(arguments, message):
    model = some_model()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **({"rank": 2, "alpha": 1} | arguments))
    assert not adapters(model)
    assert model.embed.weight.requires_grad and model.h[0].norm.weight.requires_grad


def test_adding_twice_or_to_nothing_is_refused():
    model = add_lora(some_model(), rank=2, alpha=1)
    with pytest.raises(ValueError, match="the model has adapters already, on 4 layers"):
        add_lora(model, rank=2, alpha=1)
    with pytest.raises(ValueError, match="no linear layer in a numbered block"):
        add_lora(nn.Linear(3, 3), rank=2, alpha=1)


@pytest.mark.parametrize("quantize", [True, False])
def test_parameters_are_counted_as_they_are_and_not_as_they_are_packed(quantize):
    # Embedding (and head, tied) 40 * 32; a block: norm 2 * 32, up 32 * 128 + 128, down 128 * 32.
    base = 40 * 32 + 2 * (2 * 32 + (32 * 128 + 128) + 128 * 32)
    model = some_model()
    assert count_parameters(model) == (base, base)
    if quantize:
        quantize_linears(model)
        in_linears = 2 * (128 + 2 * 32 * 128)
        assert count_parameters(model) == (base - in_linears, base)
        assert sum(p.numel() for p in model.parameters()) < base                   # what a plain count would say
    add_lora(model, rank=4, alpha=8)
    lora = 4 * 2 * (32 + 128) * 2
    assert count_parameters(model) == (lora, base + lora)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_merged_model_computes_what_the_adapted_one_did(quantize):
    model, ids = some_model().eval(), some_ids(3, 9)
    if quantize:
        quantize_linears(model)
    trained(add_lora(model, rank=4, alpha=8, targets=["up"])).eval()
    expected = model(ids)
    assert merge_lora(model, torch.float32) is model
    assert not adapters(model) and not any(isinstance(module, Linear4bit) for module in model.modules())
    assert all(type(layer) is nn.Linear for layer in block_linears(model).values())
    assert model.lm_head.weight is model.embed.weight
    # The same sums in another order: float32, of at most 128 terms, through two blocks.
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


def test_merging_adds_to_the_dequantized_weight_and_rounds_once():
    model = trained(add_lora(quantize_linears(some_model()), rank=4, alpha=6))
    layers = adapters(model)
    exact = {name: layer.base.dequantize().double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double() for name, layer in layers.items()}
    merge_lora(model)
    for name, weight in exact.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16 and not merged.requires_grad
        # Half a step of bf16 (2^-8 of the value at most), and float32's roundings on the way, of a sum of six terms below 1.
        assert ((merged.double() - weight).abs() <= weight.abs() * 2**-8 + 8 * 2**-24).all()
        # Quantizing the sum again would lose more than the adapters had changed: a whole step of NF4.
        again = Linear4bit.from_weight(merged).dequantize().double()
        assert (again - weight).abs().mean() > 10 * (merged.double() - weight).abs().mean()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_merging_leaves_a_base_in_float32_untouched():
    model = some_model()
    base = model.h[0].down.weight
    before = base.detach().clone()
    merge_lora(trained(add_lora(model, rank=4, alpha=8)), torch.float32)
    assert torch.equal(base, before) and not torch.equal(model.h[0].down.weight, before)


def test_a_few_steps_on_4_bits_lower_the_loss():
    model, ids = quantize_linears(some_model()), some_ids(8, 12)
    torch.manual_seed(0)
    add_lora(model, rank=8, alpha=16, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
