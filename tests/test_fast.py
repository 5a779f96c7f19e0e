"""The fused block and loss against the readable ones: the same numbers, forward and backward."""

import copy
import re
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minqlora import fast, fast_loss, fast_product
from minqlora.data import Batch
from minqlora.falcon import Falcon, FalconConfig
from minqlora.fast import fuse
from minqlora.fast_loss import GraphedLoss, fused_loss
from minqlora.fast_product import drop
from minqlora.lora import adapters
from minqlora.qlora import add_lora, quantize_linears
from minqlora.train import answer_loss

SMALL = dict(vocab_size=97, hidden_size=96, num_hidden_layers=3, num_attention_heads=6)
VARIANTS = {
    "7b": FalconConfig(**SMALL),
    "40b": FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True),
    "11B": FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, tie_word_embeddings=False),
}


def adapted(config, device="cpu", dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    model = Falcon(config).to(device, dtype)
    quantize_linears(model)
    add_lora(model, rank=4, alpha=8, dropout=dropout)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def a_batch(vocab_size, device="cpu", tokens=40):
    ids = torch.randint(vocab_size, (2, tokens), device=device)
    labels = ids.clone()
    labels[:, :10] = -100
    labels[1, 30:] = -100
    return Batch(ids, labels, learned=(labels.flatten() != -100).nonzero().flatten(), attention_mask=None, tokens=2 * tokens)


def loss_and_gradients(model, batch, loss):
    total = loss(model, batch)
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("keep_blocks", [0, 1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fused_block_and_loss_give_the_loss_and_gradients_of_the_readable_ones(variant, keep_blocks):
    model, batch = adapted(VARIANTS[variant]), a_batch(97)
    expected, gradients = loss_and_gradients(model, batch, answer_loss)

    fused = copy.deepcopy(model)
    fused.zero_grad()
    config = fused.config
    rows = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    a_block = 80 * 4 * (config.ffn_hidden_size + 2 * rows + config.hidden_size)
    fuse(fused, keep_bytes=keep_blocks * a_block)
    # Chunks of 7 tokens: the last one is ragged.
    actual, fused_gradients = loss_and_gradients(fused, batch, lambda model, batch: fused_loss(model, batch, chunk=7))

    # Both sides sum at most 384 + 2 * 4 products in float32, in another order, through 3 layers forward and back: some
    # sqrt(400) * 6 roundings of 6e-8, relative to the size of the whole tensor.
    tolerance = 400**0.5 * 6 * 6e-8 * 2
    assert abs(actual - expected) <= tolerance * expected
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_left_over_keeps_weights_dequantized(variant, monkeypatch):
    """In one of three blocks, with B as it is at each step."""
    model, batch = adapted(VARIANTS[variant]), a_batch(97)
    fused = copy.deepcopy(model)
    fused.zero_grad()
    probe = fuse(copy.deepcopy(model))
    blocks = fuse(fused, 3 * 80 * 4 * probe[0].kept_width + 4 * probe[0].weight_numel, tokens=80)
    assert [block.writer.kept_weight is not None for block in blocks] == [True, False, False]
    asked, into = [], fast_product.dequantize_into
    monkeypatch.setattr(fast_product, "dequantize_into", lambda base, out: (asked.append(base), into(base, out)))
    for _ in range(2):
        model.zero_grad()
        fused.zero_grad()
        expected, gradients = loss_and_gradients(model, batch, answer_loss)
        asked.clear()
        actual, fused_gradients = loss_and_gradients(fused, batch, fused_loss)
        # Four linears of two blocks, there and back.
        assert len(asked) == 2 * 4 * 2
        tolerance = 400**0.5 * 6 * 6e-8 * 2                          # as above
        assert abs(actual - expected) <= tolerance * expected
        for name, gradient in gradients.items():
            assert (fused_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name
        with torch.no_grad():
            for one, other in zip(adapters(model).values(), adapters(fused).values(), strict=True):
                one.lora_B += torch.randn_like(one.lora_B)
                other.lora_B.copy_(one.lora_B)


def with_kernels(module):
    """A module of ours in which every `if x.is_cuda` is true: the half that a GPU takes, here in Triton's interpreter."""
    changed = types.ModuleType(f"{module.__name__}_with_kernels")
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert "if x.is_cuda" in source or "if logits.is_cuda" in source
    exec(compile(re.sub(r"\w+\.is_cuda", "True", source), module.__file__, "exec"), changed.__dict__)
    if module is fast:
        changed.Product = with_kernels(fast_product).Product
    return changed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU, which takes this half anyway")
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_gpu_computes_gives_the_loss_and_gradients_too(variant):
    # Two layers: the last keeps its products, the first computes them again.
    model, batch = adapted(replace(VARIANTS[variant], num_hidden_layers=2)), a_batch(97, tokens=14)
    expected, gradients = loss_and_gradients(model, batch, answer_loss)
    fused = copy.deepcopy(model)
    fused.zero_grad()
    with_kernels(fast).fuse(fused)
    actual, fused_gradients = loss_and_gradients(fused, batch, with_kernels(fast_loss).fused_loss)
    # As above; every kernel computes in float32.
    tolerance = 400**0.5 * 6 * 6e-8 * 2
    assert abs(actual - expected) <= tolerance * expected
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU, which takes this half anyway")
def test_dropout_of_what_a_gpu_computes_is_the_same_forward_and_backward():
    model, batch = adapted(replace(VARIANTS["7b"], num_hidden_layers=1), dropout=0.3), a_batch(97, tokens=14)
    with_kernels(fast).fuse(model)
    slope_is_that_of_the_gradient(model, batch, with_kernels(fast_loss).fused_loss)


def test_the_last_block_is_kept_and_the_others_where_memory_is_left():
    model, batch = adapted(VARIANTS["7b"]), a_batch(97)
    saved = []
    for keep in (0, 10**9):
        fuse(model, keep_bytes=keep)
        total = fused_loss(model, batch)
        nodes, kept = [total.grad_fn], 0
        while nodes:
            node = nodes.pop()
            kept += getattr(node, "kept", None) is not None
            nodes += [following for following, _ in node.next_functions if following is not None]
        saved.append(kept)
    assert saved == [1, 3]                         # the last block keeps its own: it is the first to be walked back


def slope_is_that_of_the_gradient(model, batch, loss_of):
    """With the seeds fixed, the loss is a smooth function of the adapters: its gradient is the slope of the loss."""

    def loss():
        torch.manual_seed(1)
        return loss_of(model, batch)

    loss().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    slope = sum(p.grad.square().sum() for p in parameters).item()
    step = 1e-2 / slope**0.5                       # a move of 0.01 along the unit gradient
    with torch.no_grad():
        directions = [p.grad / slope**0.5 * 1e-2 for p in parameters]
        for p, d in zip(parameters, directions, strict=True):
            p += d
        up = loss().item()
        for p, d in zip(parameters, directions, strict=True):
            p -= 2 * d
        down = loss().item()
    # A central difference over 2 * 0.01: the error is of third order in the step, and the loss has 7 digits.
    assert (up - down) / 2 == pytest.approx(step * slope, rel=1e-2)


def test_dropout_of_the_fused_block_is_the_same_forward_and_backward():
    model = adapted(VARIANTS["7b"], dropout=0.3)
    fuse(model)
    slope_is_that_of_the_gradient(model, a_batch(97), fused_loss)


def test_dropout_drops_the_share_it_was_asked_for_and_the_same_values_again():
    seed = torch.tensor(12345)
    kept = drop(torch.ones(1000, 100), 0.1, seed)
    # 100 000 draws: the share's deviation is sqrt(0.1 * 0.9 / 1e5) = 0.00095; five of them.
    assert abs((kept == 0).float().mean().item() - 0.1) < 5 * 0.00095
    assert torch.equal(kept[kept > 0].unique(), torch.tensor([1 / 0.9]))
    assert torch.equal(drop(torch.full((1000, 100), 2.0), 0.1, seed), 2 * kept)
    assert not torch.equal(kept, drop(torch.ones(1000, 100), 0.1, seed + 1))


def test_what_the_fused_block_cannot_do_is_refused():
    bare = Falcon(VARIANTS["7b"])
    with pytest.raises(ValueError, match="without an adapter"):
        fuse(bare)
    sequential = adapted(FalconConfig(**SMALL, multi_query=False, alibi=True, parallel_attn=False))
    with pytest.raises(ValueError, match="parallel"):
        fuse(sequential)
    trained = adapted(VARIANTS["7b"])
    trained.transformer.ln_f.requires_grad_()
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight requires a gradient"):
        fuse(trained)
    with pytest.raises(ValueError, match=r"attention_dropout 0\.1"):
        fuse(adapted(FalconConfig(**SMALL, alibi=True, attention_dropout=0.1)))


def test_what_changes_between_a_forward_and_its_backward_is_an_error():
    model, batch = adapted(VARIANTS["7b"], dropout=0.3), a_batch(97)
    fuse(model)
    loss = fused_loss(model, batch)
    model.eval()
    with pytest.raises(RuntimeError, match="between a forward and its backward"):
        loss.backward()
    model.train()
    loss = fused_loss(model, batch)
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_h_to_4h.lora_B += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_fused_model_may_be_walked_back_twice():
    model, batch = adapted(VARIANTS["7b"]), a_batch(97)
    fuse(model, keep_bytes=10**9)
    loss, parameters = fused_loss(model, batch), [p for p in model.parameters() if p.requires_grad]
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    for first, second in zip(once, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(first, second)


def test_a_fused_model_decodes_as_before():
    model = adapted(VARIANTS["7b"]).eval()
    ids = torch.randint(97, (1, 12))
    with torch.no_grad():
        expected = model(ids)
        fuse(model)
        cache = model.new_cache(1, 12)
        parts = torch.cat([model(ids[:, :8], cache=cache), model(ids[:, 8:], cache=cache)], dim=1)
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-5)


def record_on_a_cpu(graphed, ids, labels):
    """GraphedLoss.record without CUDA: a replay computes the same again, into the same places, and a recording takes one replay."""
    ids, labels, loss = ids.clone(), labels.clone(), torch.zeros(())

    def replay():
        batch = Batch(ids, labels.roll(1, 1), (labels.roll(1, 1).flatten() != -100).nonzero().flatten(), None, ids.numel())
        with torch.enable_grad():
            total = fused_loss(graphed.model, batch)
            torch._foreach_copy_(graphed.gradients, torch.autograd.grad(total, graphed.parameters))
        loss.copy_(total.detach())

    replay()
    return SimpleNamespace(replay=replay), ids, labels, loss


def test_gradients_of_replayed_batches_add_up_though_they_share_one_place(monkeypatch):
    model = adapted(VARIANTS["7b"])
    graphed = GraphedLoss(model, fuse(model), most_tokens=256)
    monkeypatch.setattr(GraphedLoss, "record", record_on_a_cpu)
    # Two rows padded to 64, 128, 64 tokens, and two too long to be recorded: the second makes a recording in the middle of a step.
    batches = [a_batch(97, tokens=tokens) for tokens in (40, 70, 50, 150)]
    expected = [torch.zeros_like(p) for p in graphed.parameters]
    for batch in batches:
        torch._foreach_add_(expected, torch.autograd.grad(fused_loss(model, batch) / 2, graphed.parameters))
        (graphed(model, batch) / 2).backward()
        assert (graphed.parameters[0].grad is graphed.gradients[0]) == (batch is batches[0])
    assert len(graphed.recordings) == 2
    for parameter, gradient in zip(graphed.parameters, expected, strict=True):
        # Padding changes the order of a sum: some sqrt(400) roundings of 6e-8 in each of 3 layers, forward and back.
        assert (parameter.grad - gradient).norm() <= 400**0.5 * 6 * 6e-8 * 2 * gradient.norm()


def test_a_replayed_loss_is_walked_back_once_and_before_the_next(monkeypatch):
    model = adapted(VARIANTS["7b"])
    graphed = GraphedLoss(model, fuse(model), most_tokens=256)
    monkeypatch.setattr(GraphedLoss, "record", record_on_a_cpu)
    first, second = graphed(model, a_batch(97)), graphed(model, a_batch(97))
    with pytest.raises(RuntimeError, match="before the next is computed"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="walked back once"):
        second.backward()
    # Without dropout, or without a gradient, nothing is replayed: a recording is of the model in training.
    turn = graphed.turn
    graphed(model.eval(), a_batch(97))
    assert graphed.turn == turn


@pytest.mark.gpu
@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu_the_fused_block_is_as_close_to_float32_as_the_readable_one(variant, keep_bytes):
    """Both compute in bfloat16 beside the same model in float32; the fused one may be off by no more than 1.5 times the readable one."""
    batch = a_batch(97, "cuda")
    exact = adapted(VARIANTS[variant], "cuda")
    _, expected = loss_and_gradients(exact, batch, answer_loss)

    def errors(model, loss):
        model.zero_grad()
        _, gradients = loss_and_gradients(model, batch, loss)
        return sum((gradients[name].float() - expected[name]).square().sum() for name in expected).sqrt()

    model = copy.deepcopy(exact).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = exact.get_parameter(name).data.clone()
    readable = errors(model, answer_loss)
    fuse(model, keep_bytes)
    assert errors(model, fused_loss) <= 1.5 * readable


@pytest.mark.gpu
def test_a_replayed_loss_is_the_fused_loss_for_every_batch_of_its_shape_and_any_other():
    model = adapted(VARIANTS["7b"], "cuda", torch.bfloat16)
    graphed = GraphedLoss(model, fuse(model))
    for _ in range(3):
        batch = a_batch(97, "cuda")
        expected, gradients = loss_and_gradients(model, batch, fused_loss)
        model.zero_grad()
        actual, graphed_gradients = loss_and_gradients(model, batch, graphed)
        model.zero_grad()
        # The same products in bfloat16 on rows padded from 40 to 64 tokens: another kernel may sum them in another order.
        assert abs(actual - expected) <= 1e-3 * expected
        for name, gradient in gradients.items():
            assert (graphed_gradients[name] - gradient).norm() <= 2e-2 * gradient.norm(), name
    assert len(graphed.recordings) == 1
    with torch.no_grad():
        assert abs(graphed(model, batch) - expected) <= 1e-3 * expected
