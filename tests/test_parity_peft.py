"""Adapters that travel: ours under PEFT on transformers' Falcon, and PEFT's here. Tiny random models, built in the test."""

import warnings

import pytest
import torch
from torch import nn

from minqlora import Falcon, FalconConfig, add_lora, load_adapter, merge_lora, save_adapter
from minqlora.lora import adapters
from minqlora.qlora import block_linears, quantize_linears

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CONFIGS = {
    "as 7b": {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": False},
    "as 40b": {"num_kv_heads": 2, "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": True},
    "as rw-1b": {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True, "new_decoder_architecture": False},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

# Two implementations of the same sums in float32, through two blocks of width 64; logits are of size 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def falcons(config, quantize=False):
    """The same random Falcon twice: transformers' and ours. quantize: ours in 4 bits, theirs with the dequantized weights."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2, **config
    )
    theirs = transformers.FalconForCausalLM(config).eval()
    ours = Falcon(FalconConfig.from_json(config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    if quantize:
        for name, layer in block_linears(quantize_linears(ours)).items():
            theirs.get_submodule(name).weight.data.copy_(layer.dequantize())
    return theirs, ours


def some_ids():
    return torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(1))


def trained(layers):
    """B as training leaves it: not zero."""
    for layer in layers:
        nn.init.normal_(layer, std=0.1)


@each_config
@pytest.mark.parametrize("quantize", [True, False], ids=["in 4 bits", "in float32"])
def test_our_adapter_under_peft_gives_our_logits(config, quantize, tmp_path):
    theirs, ours = falcons(config, quantize)
    plain = ours(some_ids())
    add_lora(ours, rank=4, alpha=6, dropout=0.1)
    trained(layer.lora_B for layer in adapters(ours).values())
    save_adapter(ours, tmp_path, base="a/falcon", metadata={"base_hash": "0123"})
    expected = ours.eval()(some_ids())
    assert (expected - plain).abs().max() > 0.1                    # the adapter does something

    # PEFT warns of settings that it does not know, and of keys that it misses.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    torch.testing.assert_close(model(some_ids()).logits, expected, **TOLERANCE)
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (4, 6, 0.1)
    assert settings.base_model_name_or_path == "a/falcon"
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    "targets",
    [["query_key_value"], ["dense", "dense_h_to_4h"], "all-linear", r".*h\.1\.mlp\.dense.*"],
    ids=["peft's default", "two", "all", "a regular expression"],
)
def test_an_adapter_that_peft_saved_loads_here(targets, tmp_path):
    theirs, ours = falcons(CONFIGS["as 7b"])
    settings = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs, settings).eval()
    trained(p for name, p in model.named_parameters() if "lora_B" in name)
    model.save_pretrained(tmp_path)
    assert load_adapter(ours, tmp_path)["format"] == "pt"
    torch.testing.assert_close(ours(some_ids()), model(some_ids()).logits, **TOLERANCE)
    wrapped = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert wrapped == {f"base_model.model.{name}" for name in adapters(ours)}


def test_the_gradients_are_those_of_peft(tmp_path):
    theirs, ours = falcons(CONFIGS["as 7b"], quantize=True)
    add_lora(ours, rank=4, alpha=6, dropout=0.0)
    trained(layer.lora_B for layer in adapters(ours).values())
    save_adapter(ours, tmp_path)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    for logits in (ours(some_ids()), model(some_ids()).logits):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), some_ids()[:, 1:].flatten()).backward()
    for name, layer in adapters(ours).items():
        other = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-6)


def test_merging_gives_the_weights_of_peft(tmp_path):
    theirs, ours = falcons(CONFIGS["as 40b"], quantize=True)
    add_lora(ours, rank=4, alpha=6)
    trained(layer.lora_B for layer in adapters(ours).values())
    save_adapter(ours, tmp_path)
    merged = peft.PeftModel.from_pretrained(theirs, tmp_path).merge_and_unload().state_dict()
    merge_lora(ours, torch.float32)
    for name, layer in block_linears(ours).items():
        torch.testing.assert_close(layer.weight.data, merged[f"{name}.weight"], rtol=0, atol=8 * 2**-24)   # sums of five terms below 1


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"dense": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"dense": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(options, setting, tmp_path):
    theirs, ours = falcons(CONFIGS["as rw-1b"])
    settings = peft.LoraConfig(r=4, target_modules=["dense"], **options)
    peft.get_peft_model(theirs, settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"asks for what is not built here: .*{setting}="):
        load_adapter(ours, tmp_path)
    assert not adapters(ours)
