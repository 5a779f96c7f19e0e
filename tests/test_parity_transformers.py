"""transformers is the oracle: the same logits and gradients for every published Falcon, the same files, the same answers.

Models are random and small, with weights large enough that logits are of size 1 to 10: a wrong row order, norm, angle or rounding
shows at 0.1 and more, and float32 sums in another order at some 1e-6. 1e-4 stands between the two.
"""

import json

import pytest
import torch
import transformers

import minqlora.falcon as ours
from minqlora.falcon import Falcon, FalconConfig
from minqlora.generate import generate
from minqlora.load import load_falcon, save_falcon

VOCABULARY = 97
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
# What sets the published ones apart, traps included: num_kv_heads on 7b and multi_query on 180B and 11B mean nothing.
VARIANTS = {
    "rw-1b": {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    "7b": {"multi_query": True, "num_kv_heads": 6},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    "180B": {"new_decoder_architecture": True, "num_kv_heads": 3, "multi_query": True},
    "11B": {
        "new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0,
        "tie_word_embeddings": False, "max_position_embeddings": 8192, "ffn_hidden_size": 160,
    },
    "rotary, one key a head": {"multi_query": False},
    "ALiBi, multi-query": {"alibi": True, "num_attention_heads": 8},
}  # fmt: skip
variants = pytest.mark.parametrize("variant", VARIANTS)


def oracle(variant, **changes):
    """transformers' Falcon, random. Its "eager" attention adds ALiBi twice (5.23), so it computes with "sdpa", as it does by default."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(**SMALL | VARIANTS[variant] | changes, attn_implementation="sdpa")
    model = transformers.FalconForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def same(theirs):
    """Ours, with their config and weights: the names map one to one."""
    model = Falcon(FalconConfig.from_json(theirs.config.to_dict())).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def batch(tokens):
    """Three rows: one whole, one padded on the left by a few tokens, one padded up to its last four."""
    ids = torch.randint(0, VOCABULARY, (3, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[1, :7], mask[2, :-4] = 0, 0
    return ids, mask


@variants
@pytest.mark.parametrize("tokens", [20, 300])    # beyond 256, where ALiBi's roundings show
def test_logits_are_those_of_transformers(variant, tokens):
    theirs = oracle(variant)
    model = same(theirs)
    ids, mask = batch(tokens)
    with torch.no_grad():
        expected, found = theirs(ids).logits, model(ids)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.5    # of a size at which 1e-4 means something
        # What stands at padding is nobody's: only real tokens are compared.
        expected, found = theirs(ids, attention_mask=mask).logits, model(ids, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@variants
def test_gradients_are_those_of_transformers(variant):
    theirs = oracle(variant)
    model = same(theirs)
    ids, mask = batch(40)
    # Only what a real token predicts counts: the first real one is predicted from padding.
    labels = torch.where(mask.bool() & mask.roll(1, dims=1).bool(), ids, -100)
    theirs(ids, attention_mask=mask, labels=labels).loss.backward()
    logits = model(ids, mask)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0, msg=name)


def test_without_the_roundings_of_alibi_it_is_another_model_from_position_257_on(monkeypatch):
    theirs = oracle("ALiBi, multi-query")    # 8 heads: the slopes are powers of two, and exact
    model = same(theirs)
    ids, _ = batch(300)

    def slopes_alone(positions, heads, head_dim, dtype):
        bias = ours.alibi_slopes(heads).bfloat16().float()[:, None] * positions[:, None].float()
        return bias[:, :, None].to(dtype) / head_dim**0.5

    monkeypatch.setattr(ours, "alibi_bias", slopes_alone)
    with torch.no_grad():
        error = (theirs(ids).logits - model(ids)).abs().amax(dim=(0, 2))    # (tokens,)
    assert error[:257].max() < 1e-4
    assert error[257:].max() > 0.01    # a hundred times the tolerance of these tests


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 32, 71, 128, 232])
def test_alibi_is_that_of_transformers_for_any_number_of_heads(heads):
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    expected = build_alibi_tensor(torch.ones(1, 2048, dtype=torch.long), heads, torch.float32).view(1, heads, 1, 2048) / 8
    assert torch.equal(ours.alibi_bias(torch.arange(2048)[None], heads, head_dim=64, dtype=torch.float32), expected)


@pytest.mark.parametrize("variant", ["7b", "40b", "rw-1b"])
def test_in_bf16_it_is_as_near_to_float32_as_transformers_is(variant):
    theirs = oracle(variant)
    model = same(theirs)
    ids, mask = batch(300)
    with torch.no_grad():
        exact = model(ids, mask)[mask.bool()]

        def error(logits):
            return (logits[mask.bool()].float() - exact).pow(2).mean().sqrt().item()

        # Two errors of the same kind and size, each the root mean square of some 60 000 roundings: within 20 %.
        assert error(model.bfloat16()(ids, mask)) < 1.2 * error(theirs.bfloat16()(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("variant", ["rw-1b", "7b", "40b"])
def test_dropout_falls_on_the_same_values_as_in_transformers(variant):
    theirs = oracle(variant, hidden_dropout=0.2, attention_dropout=0.3).train()
    model = same(theirs).train()
    ids, mask = batch(20)
    with torch.no_grad():
        torch.manual_seed(7)
        expected = theirs(ids, attention_mask=mask).logits
        torch.manual_seed(7)
        found = model(ids, mask)
        assert not torch.equal(found, model(ids, mask))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


# --- generation -----------------------------------------------------------------------------------------------------------------


@variants
def test_greedy_answers_of_a_padded_batch_are_those_of_transformers(variant):
    theirs = oracle(variant)
    ids, mask = batch(12)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(same(theirs), ids, mask, max_new_tokens=15), expected)


# --- files ----------------------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("shard", ["10GB", "40KB"], ids=["whole", "sharded"])
def test_what_transformers_saves_loads_here(variant, shard, tmp_path):
    theirs = oracle(variant)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    model = load_falcon(tmp_path, quantize=False)
    ids, mask = batch(20)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@variants
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["whole", "sharded"])
def test_what_is_saved_here_opens_in_transformers(variant, shard_bytes, tmp_path):
    torch.manual_seed(0)
    model = Falcon(FalconConfig(**SMALL | VARIANTS[variant], initializer_range=0.3, eos_token_id=5)).eval()
    save_falcon(model, tmp_path, shard_bytes)
    theirs, report = transformers.FalconForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())    # nothing missing, unexpected or misshapen
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == (5, None)
    assert theirs.config.rope_parameters["rope_theta"] == model.config.rope_theta
    ids, mask = batch(20)
    with torch.no_grad():
        expected = theirs.eval()(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_bf16_files_open_in_transformers_as_bf16(tmp_path):
    save_falcon(same(oracle("7b")).bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert transformers.FalconForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16


def test_the_way_out_for_a_pickle_works(tmp_path, capfd):
    # The very command of the error message, run here in this process.
    theirs = oracle("7b")
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError) as caught:
        load_falcon(tmp_path)
    command = str(caught.value).partition('python -c "')[2].rstrip('"')
    exec(command.replace("CONVERTED", str(tmp_path / "converted")), {})
    ids, _ = batch(20)
    with torch.no_grad():
        torch.testing.assert_close(load_falcon(tmp_path / "converted", quantize=False)(ids), theirs(ids).logits, atol=1e-4, rtol=0)
