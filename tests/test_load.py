"""Loading and saving: every key accounted for, one tensor at a time, and a clear error for whatever is wrong with a checkpoint."""

import gc
import json
import os
import re
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minqlora import load
from minqlora.falcon import Falcon, FalconConfig
from minqlora.linear4bit import Linear4bit
from minqlora.load import eos_token_id, fetch, load_falcon, load_tokenizer, save_falcon
from minqlora.nf4 import FP4
from minqlora.qlora import add_lora, block_linears, merge_lora, quantize_linears

HEAD, EMBEDDING = "lm_head.weight", "transformer.word_embeddings.weight"
QKV = "transformer.h.0.self_attention.query_key_value.weight"


def small(**changes):
    torch.manual_seed(0)
    config = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    return Falcon(FalconConfig(**config | changes)).eval()


@pytest.fixture
def directory(tmp_path):
    """A sound checkpoint in one file."""
    save_falcon(small(), tmp_path / "falcon")
    return tmp_path / "falcon"


@pytest.fixture
def sharded(tmp_path):
    """The same in several shards."""
    save_falcon(small(), tmp_path / "sharded", shard_bytes=100_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit(directory, change):
    """Read model.safetensors, let `change` edit its dict of tensors, write it back."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


IDS = torch.arange(12).view(2, 6)


# --- sound checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_what_was_saved_loads_as_it_was_whole_or_sharded(tmp_path, bias):
    model = small(bias=bias)
    save_falcon(model, tmp_path / "one")
    save_falcon(model, tmp_path / "many", shard_bytes=50_000)
    for name in ("one", "many"):
        loaded = load_falcon(tmp_path / name, quantize=False)
        assert loaded.config == model.config or loaded.config.tie_word_embeddings is True
        assert torch.equal(loaded(IDS), model(IDS))
    assert not list(tmp_path.glob("*/.saving-*"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", [{}, {"code": FP4, "blocksize": 32}, {"double_quant": False}], ids=["NF4", "FP4", "single"])
def test_a_model_quantized_while_it_loads_is_the_model_quantized_afterwards(tmp_path, bias, how):
    model = small(bias=bias)
    save_falcon(model, tmp_path)
    loaded = load_falcon(tmp_path, **how)
    assert all(isinstance(linear, Linear4bit) for linear in block_linears(loaded).values())
    expected = quantize_linears(model, **how)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(loaded(IDS), expected(IDS))


def test_the_weights_go_to_4_bits_from_what_the_file_holds_and_the_rest_to_dtype(directory):
    loaded = load_falcon(directory, dtype=torch.bfloat16)
    plain = small()
    assert loaded.transformer.word_embeddings.weight.dtype is torch.bfloat16
    assert loaded.transformer.ln_f.weight.dtype is torch.bfloat16
    for name, linear in block_linears(loaded).items():
        expected = Linear4bit.from_weight(plain.get_submodule(name).weight)    # float32, not rounded to bf16 before
        assert torch.equal(linear.weight, expected.weight)
    assert loaded(IDS).dtype is torch.bfloat16


def test_one_tensor_at_a_time_beside_the_model(directory, monkeypatch):
    whole = {tuple(linear.weight.shape) for linear in block_linears(small()).values()}
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
    alive = []
    from_weight = Linear4bit.from_weight

    def watched(weight, *rest):
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and id(thing) not in before]
        alive.append(sum(tuple(tensor.shape) in whole and tensor.is_floating_point() for tensor in tensors))
        return from_weight(weight, *rest)

    monkeypatch.setattr(load.Linear4bit, "from_weight", watched)
    load_falcon(directory)
    assert alive == [1] * len(block_linears(small()))


def test_the_file_can_be_overwritten_while_its_model_lives(directory):
    loaded = load_falcon(directory, quantize=False)
    before = loaded(IDS)
    path = directory / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:    # in place: a tensor still mapped to the file would change
        file.write(b"\xff" * size)
    assert torch.equal(loaded(IDS), before)


def test_a_checkpoint_of_the_first_spelling_loads(directory):
    config = json.loads((directory / "config.json").read_text())
    old = {"model_type": "RefinedWebModel", "n_embed": 64, "n_layer": 2, "n_head": 4, "vocab_size": 61}
    old |= {"multi_query": True, "parallel_attn": True, "alibi": False, "bias": False, "eos_token_id": config["eos_token_id"]}
    (directory / "config.json").write_text(json.dumps(old))
    edit(directory, lambda tensors: tensors.update({"transformer.h.0.self_attention.maybe_rotary.inv_freq": torch.ones(8)}))
    assert torch.equal(load_falcon(directory, quantize=False)(IDS), small()(IDS))


def with_head(directory, change, **config):
    edit(directory, lambda tensors: tensors.update({HEAD: change(tensors[EMBEDDING])}))
    edit_json(directory / "config.json", **config)


@pytest.mark.parametrize("says", [None, True])
def test_a_head_that_repeats_the_embedding_is_the_embedding(directory, says):
    with_head(directory, torch.clone, tie_word_embeddings=says)
    loaded = load_falcon(directory)
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    assert loaded.config.tie_word_embeddings is True


def test_a_head_of_its_own_wins_over_a_tie_that_nobody_set(directory):
    with_head(directory, lambda embedding: embedding + 1, tie_word_embeddings=None)
    loaded = load_falcon(directory, quantize=False)
    assert torch.equal(loaded.lm_head.weight, loaded.transformer.word_embeddings.weight + 1)
    assert loaded.config.tie_word_embeddings is False


def test_a_head_of_its_own_against_an_explicit_tie_is_an_error(directory):
    def nearly(embedding):    # the last value alone
        changed = embedding.clone()
        changed[-1, -1] += 1
        return changed

    with_head(directory, nearly, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"tie_word_embeddings: true, but lm_head.weight differs"):
        load_falcon(directory)


def test_an_untied_head_stays_its_own_even_where_it_equals_the_embedding(directory):
    with_head(directory, torch.clone, tie_word_embeddings=False)
    loaded = load_falcon(directory)
    assert loaded.lm_head.weight is not loaded.transformer.word_embeddings.weight


# --- what is wrong with a checkpoint --------------------------------------------------------------------------------------------


def test_all_that_is_missing_unexpected_or_misshapen_is_in_one_error(directory):
    def spoil(tensors):
        del tensors["transformer.ln_f.bias"], tensors["transformer.h.1.mlp.dense_4h_to_h.weight"]
        tensors["transformer.h.0.mlp.gate.weight"] = torch.ones(2)
        tensors["transformer.h.2.input_layernorm.weight"] = torch.ones(64)
        tensors[QKV] = tensors[QKV][:-1].contiguous()
        tensors["transformer.h.0.self_attention.dense.weight"] = torch.zeros(64, 64, dtype=torch.int8)

    edit(directory, spoil)
    with pytest.raises(ValueError) as caught:
        load_falcon(directory)
    assert re.sub(" +", " ", str(caught.value)).splitlines()[1:] == [
        f" misshapen {QKV} [95, 64], expected [96, 64]",
        " wrong type transformer.h.0.self_attention.dense.weight holds I8, expected one of F64, F32, F16, BF16",
        " missing transformer.h.1.mlp.dense_4h_to_h.weight [64, 256]",
        " missing transformer.ln_f.bias [64]",
        " unexpected transformer.h.0.mlp.gate.weight",
        " unexpected transformer.h.2.input_layernorm.weight",
    ]


def test_a_weight_that_cannot_be_quantized_is_named(directory):
    edit(directory, lambda tensors: tensors[QKV].view(-1)[7].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{re.escape(QKV)}: absmax holds 1 values that are NaN or infinite"):
        load_falcon(directory)


def test_nothing_is_read_before_every_key_is_accounted_for(directory, monkeypatch):
    edit(directory, lambda tensors: tensors.pop("transformer.ln_f.bias"))
    monkeypatch.setattr(load.Linear4bit, "from_weight", lambda *_: pytest.fail("a tensor was quantized"))
    with pytest.raises(ValueError, match=r"missing +transformer\.ln_f\.bias"):
        load_falcon(directory)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_shard_cut_short_is_named(sharded, keep):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{path.name} \({path.stat().st_size} bytes\) is cut short or damaged"):
        load_falcon(sharded)


def test_every_missing_shard_is_named(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].unlink(), shards[2].unlink()
    with pytest.raises(FileNotFoundError, match=rf"2 of {len(shards)} shards are missing: '{shards[0].name}', '{shards[2].name}'"):
        load_falcon(sharded)


@pytest.mark.parametrize("outside", ["../falcon/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "..\\model.safetensors"])
def test_an_index_that_points_outside_its_directory_is_refused(sharded, directory, outside):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {EMBEDDING: outside})
    with pytest.raises(ValueError, match="points outside its directory"):
        load_falcon(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_falcon(sharded)


def test_a_key_that_the_index_puts_into_another_shard_is_missing(sharded):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[EMBEDDING])
    edit_json(path, weight_map=weight_map | {EMBEDDING: other})
    with pytest.raises(ValueError, match=rf"missing +{EMBEDDING}"):
        load_falcon(sharded)


def test_a_pickle_is_refused_with_the_way_out(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"(?s)holds pytorch_model\.bin.*pickle.*from_pretrained.*save_pretrained"):
        load_falcon(directory)


def test_a_directory_without_weights_says_what_it_lacks(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_falcon(directory)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"config\.json: no such file"),
        ("{'model_type'", ValueError, r"config\.json is not JSON"),
        ("[1]", ValueError, r"config\.json holds a list"),
        ('{"model_type": "llama"}', ValueError, "'llama' is not a Falcon"),
    ],
)
def test_a_config_that_is_no_falcon_is_refused(directory, content, error, message):
    path = directory / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=message):
        load_falcon(directory)


# --- saving ---------------------------------------------------------------------------------------------------------------------


def test_a_tied_head_is_saved_once_and_the_file_says_pt(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert HEAD not in file.keys()  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is True


def test_every_file_can_be_read_by_whom_the_umask_lets(tmp_path):
    umask = os.umask(0o027)
    try:
        save_falcon(small(), tmp_path, shard_bytes=100_000)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_merged_model_is_saved_and_one_with_adapters_or_4_bits_is_refused(tmp_path):
    model = add_lora(quantize_linears(small()), rank=2)
    with pytest.raises(ValueError, match="merge_lora"):
        save_falcon(model, tmp_path)
    merge_lora(model, torch.float32)
    save_falcon(model, tmp_path)
    assert torch.equal(load_falcon(tmp_path, quantize=False)(IDS), model(IDS))


def test_saving_again_leaves_no_shard_of_the_last_time(sharded):
    (sharded / "tokenizer.json").write_text("{}")
    other = small(hidden_size=128)
    save_falcon(other, sharded)
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(load_falcon(sharded, quantize=False)(IDS), other(IDS))
    save_falcon(small(), sharded, shard_bytes=100_000)
    assert torch.equal(load_falcon(sharded, quantize=False)(IDS), small()(IDS))
    assert not (sharded / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["directory", "sharded"])
def test_a_disk_that_fills_up_leaves_what_was_there(kind, request):
    path = request.getfixturevalue(kind)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    # No file may grow beyond 120 KB: the first shards fit, the one with a linear of 64 x 512 values in float32 does not.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written, and is as it was: .*File too large"):
            save_falcon(small(ffn_hidden_size=512), path, shard_bytes=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [("cpu", None, torch.float32), ("cuda", (7, 5), torch.float32), ("cuda", (8, 0), torch.bfloat16), ("cuda", (9, 0), torch.bfloat16)],
)
def test_bf16_where_the_hardware_multiplies_it_else_float32(device, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert load.fast_dtype(torch.device(device)) is dtype


# --- tokenizer, eos, hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 2}, 5),
        ({}, {"eos_token_id": 2}, 2),
        (None, {"eos_token_id": 2}, 2),
        ({"eos_token_id": [9, 2]}, {}, 9),
    ],
)
def test_generation_config_says_which_eos_ends_an_answer_else_config(tmp_path, generation, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_id(tmp_path) == expected


def test_a_model_without_eos_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="eos_token_id"):
        eos_token_id(tmp_path)


def test_a_tokenizer_neither_pads_nor_cuts_whatever_its_file_asks_for(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "bond": 1, "[PAD]": 2}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(max_length=1)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a bond a").ids == [0, 1, 0]


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_name_that_is_no_directory_is_fetched_without_pickles_and_code(directory, monkeypatch):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr(load, "snapshot_download", snapshot_download)
    loaded = load_falcon("tiiuae/falcon-7b", quantize=False)
    assert torch.equal(loaded(IDS), small()(IDS))
    assert asked["name"] == "tiiuae/falcon-7b"
    from fnmatch import fnmatch

    def wanted(name):
        return any(fnmatch(name, pattern) for pattern in asked["patterns"])

    needed = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"]
    assert all(map(wanted, needed))
    assert not any(map(wanted, ["pytorch_model-00001-of-00002.bin", "modeling_falcon.py", "handler.py", "README.md", "coreml/weight.bin"]))


def test_a_name_of_pickles_alone_says_how_to_convert_them(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"(?s)falcon-rw-1b: the hub has no safetensors.*from_pretrained\('tiiuae/falcon-rw-1b'\)"):
        fetch("tiiuae/falcon-rw-1b")


def test_offline_the_error_says_what_was_tried(tmp_path, monkeypatch):
    # The hub's own code, with its switch for offline: conftest.py sets it.
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing: no such directory, and it could not be fetched from the hub"):
        fetch("nobody/nothing")


@pytest.mark.parametrize("name", ["./falcon", "/models/falcon", "a/b/c", "~/falcon", "../falcon"])
def test_a_path_with_a_slip_never_reaches_the_hub(name, monkeypatch):
    monkeypatch.setattr(load, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        fetch(name)


def test_a_directory_is_taken_as_it_is(directory):
    assert fetch(str(directory)) == directory


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_the_model_and_one_tensor(tmp_path):
    model = small(hidden_size=512, num_hidden_layers=6, vocab_size=500)
    save_falcon(model, tmp_path)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load_falcon(tmp_path, device="cuda")
    peak, left = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    largest = 512 * 2048 * 4    # dense_h_to_4h in float32, as the file holds it
    # Quantizing may take a few small tables and the absmax in float32, 1/64 of the weights, beside it.
    assert peak <= left + 1.1 * largest
    assert loaded(IDS.cuda()).isfinite().all()
