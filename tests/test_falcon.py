"""The decoder by hand and by its properties. That it is transformers' Falcon, test_parity_transformers.py shows."""

import copy
import dataclasses
import math

import pytest
import torch

from minqlora.falcon import Falcon, FalconConfig, alibi_bias, alibi_slopes, rotary_angles, rotate

SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "initializer_range": 0.3}
VARIANTS = {
    "7b": {},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "11b": {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0,
        "tie_word_embeddings": False,
    },
    "rw-1b": {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
}  # fmt: skip
# Logits here are of size 1 to 10; float32 sums in another order differ by some 1e-6 of that.
CLOSE = {"atol": 5e-5, "rtol": 1e-5}

variants = pytest.mark.parametrize("variant", VARIANTS)


def small(variant, **changes):
    torch.manual_seed(0)
    return Falcon(FalconConfig(**SMALL | VARIANTS[variant] | changes)).eval()


def padded_batch(lengths, vocab_size=61):
    """Random prompts of these lengths, padded on the left: ids and mask, each (batch, longest)."""
    longest = max(lengths)
    ids = torch.randint(0, vocab_size, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return ids, mask


# --- config ---------------------------------------------------------------------------------------------------------------------

FALCON_7B = {
    "model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
    "num_kv_heads": 71, "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": False,
}  # fmt: skip
FALCON_40B = FALCON_7B | {
    "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True,
}  # fmt: skip
FALCON_180B = FALCON_40B | {"hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232}
FALCON_11B = FALCON_40B | {
    "hidden_size": 4096, "num_attention_heads": 32, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0,
    "max_position_embeddings": 8192, "ffn_hidden_size": 16384, "tie_word_embeddings": False,
}  # fmt: skip
FALCON_RW_1B = FALCON_7B | {
    "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_kv_heads": 32,
    "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tied", "untied"),
    [
        pytest.param(FALCON_RW_1B, 1.312e9, 1.415e9, id="rw-1b"),
        pytest.param(FALCON_7B, 6.922e9, 7.217e9, id="7b"),
        pytest.param(FALCON_40B, 41.303e9, 41.836e9, id="40b"),
        pytest.param(FALCON_180B, 178.56e9, 179.52e9, id="180B"),
        pytest.param(FALCON_11B, 10.84e9, 11.103e9, id="11B"),
    ],
)
def test_every_published_falcon_has_its_published_number_of_parameters(config, tied, untied):
    for tie, expected in ((True, tied), (False, untied)):
        with torch.device("meta"):
            model = Falcon(FalconConfig.from_json(config | {"tie_word_embeddings": tie}))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == pytest.approx(expected, rel=5e-4)    # the figures have four digits


@pytest.mark.parametrize(
    ("config", "kv_heads", "rows"),
    [(FALCON_RW_1B, 32, 6144), (FALCON_7B, 1, 4672), (FALCON_40B, 8, 9216), (FALCON_180B, 8, 15872), (FALCON_11B, 8, 6144)],
    ids=["rw-1b", "7b", "40b", "180B", "11B"],
)
def test_key_value_heads_are_the_real_ones_whatever_the_file_says(config, kv_heads, rows):
    resolved = FalconConfig.from_json(config)
    assert resolved.num_kv_heads == kv_heads
    with torch.device("meta"):
        block = Falcon(dataclasses.replace(resolved, num_hidden_layers=1)).transformer.h[0]
    assert block.self_attention.query_key_value.out_features == rows


def test_the_first_spelling_reads_as_todays():
    old_7b = {
        "model_type": "RefinedWebModel", "vocab_size": 65024, "n_embed": 4544, "n_layer": 32, "n_head": 71,
        "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False,
    }  # fmt: skip
    assert FalconConfig.from_json(old_7b) == FalconConfig.from_json(FALCON_7B)
    # The 40b said neither new_decoder_architecture nor multi_query: its name meant the one, and its code read the other as false.
    old_40b = {
        "model_type": "RefinedWeb", "vocab_size": 65024, "hidden_size": 8192, "n_layer": 60, "n_head": 128, "n_head_kv": 8,
        "parallel_attn": True, "alibi": False, "bias": False,
    }  # fmt: skip
    assert FalconConfig.from_json(old_40b) == dataclasses.replace(FalconConfig.from_json(FALCON_40B), multi_query=False)
    old_rw = {
        "model_type": "RefinedWebModel", "vocab_size": 50304, "hidden_size": 2048, "n_layer": 24, "n_head": 32,
        "alibi": True, "bias": True,
    }  # fmt: skip
    assert FalconConfig.from_json(old_rw) == FalconConfig.from_json(FALCON_RW_1B)


def test_theta_is_found_where_transformers_4_and_where_5_puts_it():
    by_4 = FALCON_11B | {"torch_dtype": "bfloat16", "rope_scaling": None}
    by_5 = {key: value for key, value in FALCON_11B.items() if key != "rope_theta"}
    by_5 |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 500042.0, "rope_type": "default"}}
    assert FalconConfig.from_json(by_4) == FalconConfig.from_json(by_5)
    assert FalconConfig.from_json(by_5).rope_theta == 500042.0


@pytest.mark.parametrize("config", [FALCON_RW_1B, FALCON_7B, FALCON_40B, FALCON_180B, FALCON_11B])
def test_a_config_written_and_read_again_is_the_same(config):
    config = FalconConfig.from_json(config)
    assert FalconConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not a Falcon"),
        ({"model_type": None}, "None is not a Falcon"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_size": 4545}, "hidden_size 4545 is not a multiple of num_attention_heads 71"),
        ({"hidden_size": "4544"}, "hidden_size is '4544'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"new_decoder_architecture": True, "num_kv_heads": 8}, "num_attention_heads 71 is not a multiple of num_kv_heads 8"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2"),
        ({"hidden_size": 71 * 63}, "head_dim 63 is odd"),
        ({"n_layer": 31}, "n_layer = 31 and num_hidden_layers = 32"),
        ({"activation": "relu"}, "'relu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "only the type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "only the type 'default'"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ],
)
def test_a_config_that_is_no_falcon_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        FalconConfig.from_json(FALCON_7B | change)


# --- positions ------------------------------------------------------------------------------------------------------------------


def test_rotary_turns_the_pair_of_the_two_halves_by_position_times_frequency():
    # head_dim 4, theta 100: frequencies 1 and 100^(-2/4) = 0.1. Position 2 turns (x0, x2) by 2 and (x1, x3) by 0.2.
    cos, sin = rotary_angles(torch.tensor([[2]]), head_dim=4, theta=100.0, dtype=torch.float32)
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 1, 4), cos, sin).flatten()
    expected = torch.tensor([math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2)])
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)    # angles up to 2, one rounding each


def test_rotary_products_depend_on_the_distance_alone():
    query, key = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))

    def score(query_position, key_position):
        def turn(x, position):
            return rotate(x.view(1, 1, 1, 1, 64), *rotary_angles(torch.tensor([[position]]), 64, 1e4, torch.float32)).flatten()

        return turn(query, query_position) @ turn(key, key_position)

    # An angle near 1000 is rounded to 3e-5, and 64 products of size 1 carry that.
    torch.testing.assert_close(score(7, 3), score(1007, 1003), atol=64 * 3e-5, rtol=0)


def test_alibi_slopes_halve_and_other_counts_fill_the_gaps():
    torch.testing.assert_close(alibi_slopes(8), 0.5 ** torch.arange(1.0, 9.0))
    # 6 heads: the 4 of a power of two, then every other one of 8's.
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]))


def test_alibi_rounds_position_257_to_256():
    positions = torch.tensor([[255, 256, 257, 258, 259]])
    bias = alibi_bias(positions, heads=8, head_dim=64, dtype=torch.float32)    # (1, 8, 1, 5)
    # bf16 has 8 bits: above 256 it counts by twos, ties to the even. Slope of head 0 is 1/2, the square root of head_dim 8.
    assert bias[0, 0, 0].tolist() == [255 / 16, 256 / 16, 256 / 16, 258 / 16, 260 / 16]


# --- attention ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kv_heads"),
    [({}, 1), ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2), ({"multi_query": False}, 6)],
    ids=["multi-query", "grouped", "one a head"],
)
def test_a_lone_token_gets_the_value_of_its_group(changes, kv_heads):
    # One token attends to itself alone, so each head returns its group's value: the last head_dim rows of the group.
    torch.manual_seed(0)
    model = Falcon(FalconConfig(**SMALL | changes, bias=True))
    attention = model.transformer.h[0].self_attention
    rows = torch.arange(attention.query_key_value.out_features, dtype=torch.float32)
    with torch.no_grad():
        attention.query_key_value.weight.zero_()
        attention.query_key_value.bias.copy_(rows)
        attention.dense.weight.copy_(torch.eye(24))
    x = torch.zeros(1, 1, 24)
    mixed = attention(x, model.context(1, None, None, x))
    values = rows.view(kv_heads, -1, 4)[:, -1]    # head_dim 4
    assert mixed.flatten().tolist() == values.repeat_interleave(6 // kv_heads, dim=0).flatten().tolist()


@variants
def test_no_token_sees_a_later_one(variant):
    model = small(variant)
    ids, _ = padded_batch([9])
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 61
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], **CLOSE)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-2


@variants
def test_a_prompt_padded_on_the_left_gives_what_it_gives_alone(variant):
    model = small(variant)
    lengths = [300, 7, 281, 1]    # beyond 256, where ALiBi rounds
    ids, mask = padded_batch(lengths)
    together = model(ids, mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row, -length:], model(ids[row : row + 1, -length:])[0], **CLOSE)


@pytest.mark.parametrize("variant", ["7b", "40b", "11b"])
def test_records_that_share_a_row_give_what_they_give_alone(variant):
    model = small(variant)
    ids, _ = padded_batch([20])
    record = torch.tensor([[0] * 3 + [1] * 9 + [2] * 8])
    together = model(ids, record)
    torch.testing.assert_close(together[:, 3:12], model(ids[:, 3:12]), **CLOSE)
    torch.testing.assert_close(together[:, 12:], model(ids[:, 12:]), **CLOSE)


@variants
def test_a_row_of_padding_alone_gives_finite_logits_and_gradients(variant):
    model = small(variant)
    ids, mask = padded_batch([6, 3])
    mask[1] = 0
    model(ids, mask).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_mask_of_another_shape_is_refused():
    model = small("7b")
    with pytest.raises(ValueError, match=r"attention_mask \(2, 5\) is not of input_ids' shape \(2, 4\)"):
        model(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 5))


# --- cache ----------------------------------------------------------------------------------------------------------------------


@variants
def test_token_by_token_with_a_cache_equals_all_at_once(variant):
    model = small(variant)
    lengths = [270, 262, 3]
    ids, mask = padded_batch(lengths)
    at_once = model(ids, mask)
    with torch.no_grad():
        cache = model.new_cache(batch=3, length=275)    # larger than needed: what is not filled must not be seen
        steps = [model(ids[:, :255], mask[:, :255], cache)]                       # the prompt
        steps += [model(ids[:, 255:261], mask[:, 255:261], cache)]                # several tokens more
        # one at a time; where the mask says all are real it can be left out
        steps += [model(ids[:, i : i + 1], mask[:, i : i + 1] if i < 267 else None, cache) for i in range(261, 270)]
    one_by_one = torch.cat(steps, dim=1)
    torch.testing.assert_close(one_by_one[mask.bool()], at_once[mask.bool()].detach(), **CLOSE)
    assert cache.filled == 270


@variants
def test_the_first_call_looks_at_its_own_tokens_and_at_no_other_slot(variant):
    model = small(variant)
    ids, mask = padded_batch([20, 12])
    with torch.no_grad():
        for some in (mask, None):
            expected = model(ids, some)
            cache = model.new_cache(2, 600)
            for use in ("new", "cleared"):
                cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
                assert torch.equal(model(ids, some, cache), expected), use
                cache.clear()


@pytest.mark.parametrize(
    ("config", "bytes_a_token"),
    [
        (FALCON_7B, 8192),      # 2 * 32 layers * 1 head * 64 * 2 bytes
        (FALCON_40B, 122880),   # 2 * 60 * 8 * 64 * 2
    ],
)
def test_the_cache_holds_the_real_key_value_heads_alone(config, bytes_a_token):
    with torch.device("meta"):
        cache = Falcon(FalconConfig.from_json(config)).bfloat16().new_cache(batch=2, length=100)
    assert cache.keys.nbytes + cache.values.nbytes == 2 * 100 * bytes_a_token


def test_a_decode_step_keeps_every_shape_and_every_address():
    model = small("7b")
    ids, mask = padded_batch([5, 3])
    with torch.no_grad():
        cache = model.new_cache(2, 12)
        model(ids, mask, cache)
        addresses = [x.data_ptr() for x in (cache.keys, cache.values, cache.present, cache.filled)]
        for _ in range(7):
            model(ids[:, :1], None, cache)
    assert [x.data_ptr() for x in (cache.keys, cache.values, cache.present, cache.filled)] == addresses
    assert cache.filled == 12


# --- training -------------------------------------------------------------------------------------------------------------------


@variants
def test_weights_start_normal_and_biases_at_zero(variant):
    model = small(variant, hidden_size=96, initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if "ln" in name or "layernorm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            # The standard deviation of n values is known to 1 / sqrt(2 n); 5 of those.
            assert parameter.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * parameter.numel()))


@variants
def test_checkpointing_keeps_less_and_changes_no_gradient(variant):
    model = small(variant).train()
    ids, mask = padded_batch([16, 11])

    def step(checkpointing):
        model.checkpointing = checkpointing
        model.zero_grad()
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, mask)[mask.bool()].square().mean()
        loss.backward()
        return sum(kept.values()), [parameter.grad.clone() for parameter in model.parameters()]

    bytes_whole, whole = step(checkpointing=False)
    bytes_kept, recomputed = step(checkpointing=True)
    for a, b in zip(recomputed, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)    # the same operations in the same order
    assert bytes_kept < 0.6 * bytes_whole


def test_dropout_acts_in_training_alone():
    model = small("rw-1b", hidden_dropout=0.2, attention_dropout=0.2)
    ids, _ = padded_batch([8])
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not():
    tied, untied = small("7b"), small("11b")
    assert tied.lm_head.weight is tied.transformer.word_embeddings.weight
    assert untied.lm_head.weight is not untied.transformer.word_embeddings.weight


def test_a_step_in_bf16_is_finite_and_near_float32():
    model = small("7b", initializer_range=0.1)
    ids, mask = padded_batch([40, 13])
    exact = model(ids, mask).detach()
    rounded = model.bfloat16()(ids, mask)
    rounded.float().square().mean().backward()
    assert rounded.dtype is torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # Some 20 roundings of 2^-9 on the way to a logit, as a random walk: sqrt(20) * 2^-9 = 0.9 % of their size; four times that.
    error = (rounded.float() - exact)[mask.bool()].pow(2).mean().sqrt() / exact[mask.bool()].pow(2).mean().sqrt()
    assert error < 0.035


def test_the_whole_model_is_one_graph_for_the_compiler():
    model = small("7b", num_hidden_layers=1)
    ids, mask = padded_batch([6, 4])
    compiled = torch.compile(model, backend="eager", fullgraph=True)    # "eager" traces, and leaves the code as it is
    torch.testing.assert_close(compiled(ids, mask), model(ids, mask), rtol=0, atol=0)


# --- on a GPU -------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@variants
def test_a_gpu_gives_the_logits_and_gradients_of_the_cpu(variant):
    model = small(variant)
    ids, mask = padded_batch([300, 281, 4])
    mask[2, -4:] = 2

    def step(device):
        model.to(device).zero_grad()
        logits = model(ids.to(device), mask.to(device))[mask.to(device) > 0]
        logits.square().mean().backward()
        # Copies: a model that moves takes its gradients along.
        return logits.detach().cpu(), {name: parameter.grad.cpu().clone() for name, parameter in model.named_parameters()}

    (expected, expected_gradients), (found, gradients) = step("cpu"), step("cuda")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0, msg=name)


@pytest.mark.gpu
@variants
def test_a_decode_step_can_be_captured_as_a_cuda_graph(variant):
    model = small(variant).cuda()
    ids, mask = padded_batch([20, 12])
    ids, mask = ids.cuda(), mask.cuda()
    with torch.no_grad():
        expected = model(ids, mask)
        cache, token = model.new_cache(2, 24), ids[:, :1].clone()
        # A side stream warms up whatever allocates on first use; then the cache is emptied again.
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            model(token, None, cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, None, cache)
        cache.filled.zero_(), cache.present.zero_()
        model(ids[:, :15], mask[:, :15], cache)
        for i in range(15, 20):
            token.copy_(ids[:, i : i + 1])
            graph.replay()
            torch.testing.assert_close(logits[:, 0], expected[:, i], **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_many_heads_over_a_cache_on_a_gpu_are_those_of_float64(tokens):
    """More than 64 heads on one key head: a stretch of 64 queries then reaches into the next row, which one kernel of PyTorch's minds."""
    torch.manual_seed(0)
    config = FalconConfig(61, 71 * 8, 2, 71, initializer_range=0.05)
    model = Falcon(config).eval().cuda()
    ids, mask = (t.cuda() for t in padded_batch((100, 60, 17)))
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(ids, mask)[:, -tokens:]
        cache = model.new_cache(3, 128)
        model(ids[:, :-tokens], mask[:, :-tokens], cache)
        torch.testing.assert_close(model(ids[:, -tokens:], None, cache).double(), expected, **CLOSE)
