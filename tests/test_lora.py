"""lora.py: the product by hand, what is random, and adapters on disk. PEFT itself reads and writes them in test_parity_peft.py."""

import json
import os
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minqlora.lora import CONFIG, WEIGHTS, LoRALinear, adapters, linears, load_adapter, replace, save_adapter

KEY = "base_model.model.h.0.up.lora_A.weight"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(6, 12, bias=False)

    def forward(self, x):
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


def some_model(seed=0):
    torch.manual_seed(seed)
    return Model()


def adapted(names=("h.0.up", "h.0.down", "h.1.up", "h.1.down"), rank=3, alpha=6, dropout=0.25, seed=0):
    """A model whose adapters are not zero."""
    model = some_model(seed)
    for name in names:
        layer = LoRALinear(model.get_submodule(name), rank, alpha, dropout)
        nn.init.normal_(layer.lora_B)
        replace(model, name, layer)
    return model.eval()


def some_x(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_product_by_hand():
    base = nn.Linear(2, 2)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
    layer = LoRALinear(base, rank=1, alpha=3)
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [5.0]])
    # x = (4, 1): base (6, 16) + (10, 20); x A^T = 3; scale 3 / 1; B (2, 5): 3 * 3 * (2, 5) = (18, 45).
    assert layer.scale == 3
    assert layer(torch.tensor([[4.0, 1.0]])).tolist() == [[6 + 10 + 18, 16 + 20 + 45]]


def test_at_the_start_it_is_the_base_exactly():
    base, x = nn.Linear(20, 7), some_x(5, 20)
    expected = base(x)
    layer = LoRALinear(base, rank=4, alpha=8, dropout=0.5).train()
    assert torch.equal(layer(x), expected)
    assert (layer.in_features, layer.out_features) == (20, 7)
    assert layer.lora_A.shape == (4, 20) and layer.lora_B.shape == (7, 4)


def test_a_is_uniform_within_one_over_the_root_of_its_inputs_and_follows_the_seed():
    def lora_A(dtype=torch.float32):
        torch.manual_seed(7)
        return LoRALinear(nn.Linear(400, 3), rank=64, alpha=1, dtype=dtype).lora_A

    bound = 400**-0.5
    assert lora_A().abs().max() <= bound
    # A uniform value has the variance bound^2 / 3. The square of one has a standard deviation of 0.9 of that, so the mean over 25600
    # values is within 3 %, which is five standard deviations.
    assert abs(lora_A().square().mean() / (bound**2 / 3) - 1) < 0.03
    assert torch.equal(lora_A(), lora_A())
    assert torch.equal(lora_A(torch.bfloat16), lora_A().bfloat16())


def test_only_the_adapter_is_trained():
    layer = LoRALinear(nn.Linear(20, 7), rank=4, alpha=8)
    layer(some_x(5, 20)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_gradcheck():
    layer = LoRALinear(nn.Linear(5, 4).double(), rank=2, alpha=3, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = some_x(3, 5).double().requires_grad_()

    def product(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.lora_A, layer.lora_B))


def test_dropout_acts_on_the_input_of_a_alone():
    layer = LoRALinear(nn.Linear(50, 8), rank=4, alpha=8, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = some_x(3, 50)
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    assert (dropped == 0).any()
    torch.testing.assert_close(y, layer.base(x) + 2 * (dropped @ layer.lora_A.T @ layer.lora_B.T))
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + 2 * (x @ layer.lora_A.T @ layer.lora_B.T))


def test_over_bf16_it_computes_in_bf16_and_trains_in_float32():
    layer = LoRALinear(nn.Linear(20, 7).bfloat16(), rank=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    y = layer(some_x(5, 20).bfloat16())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_it_can_be_built_on_meta():
    layer = LoRALinear(nn.Linear(20, 7, device="meta"), rank=4, alpha=8)
    assert layer.lora_A.is_meta and layer.lora_B.is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be an integer of at least 1"),
        ({"rank": 2.5}, r"rank is 2\.5"),
        ({"alpha": 0}, "alpha is 0; it must be greater than 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, r"dropout is 1\.0; it must be at least 0 and less than 1"),
        ({"dropout": -0.1}, r"dropout is -0\.1"),
    ],
)
def test_what_makes_no_adapter_is_said_and_leaves_the_base_alone(arguments, message):
    base = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, **({"rank": 1, "alpha": 1} | arguments))
    assert base.weight.requires_grad


def test_linears_are_found_by_what_they_are_and_once():
    class Subclass(nn.Linear):
        pass

    model = adapted(["h.0.up"])
    model.h[1].up = Subclass(6, 10)
    assert list(linears(model)) == ["h.0.up", "h.0.down", "h.1.up", "h.1.down", "lm_head"]
    assert list(adapters(model)) == ["h.0.up"]


def test_an_adapter_comes_back(tmp_path):
    model, x = adapted(), some_x(2, 6)
    save_adapter(model, tmp_path / "new" / "place", base="some/base", metadata={"base_hash": "abc"})
    fresh = some_model().eval()
    assert not torch.equal(fresh(x), model(x))
    metadata = load_adapter(fresh, tmp_path / "new" / "place")
    assert metadata == {"format": "pt", "base_hash": "abc"}
    assert torch.equal(fresh(x), model(x))
    for name, layer in adapters(fresh).items():
        theirs = model.get_submodule(name)
        assert (layer.rank, layer.alpha, layer.dropout) == (theirs.rank, theirs.alpha, theirs.dropout) == (3, 6, 0.25)
        assert not layer.training and layer.lora_A.dtype == torch.float32
    assert {name.rpartition(".")[2] for name, p in fresh.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_the_files_are_named_and_filled_as_peft_does(tmp_path):
    save_adapter(adapted(), tmp_path, base="some/base")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / CONFIG).read_text())
    wanted = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "lora_dropout": 0.25, "bias": "none", "task_type": "CAUSAL_LM"}
    assert wanted.items() <= config.items()
    assert config["target_modules"] == ["down", "up"] and config["base_model_name_or_path"] == "some/base"
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(
            f"base_model.model.h.{i}.{layer}.lora_{part}.weight" for i in (0, 1) for layer in ("up", "down") for part in "AB"
        )


def test_layers_are_named_in_full_where_not_all_of_a_name_are_adapted(tmp_path):
    model = adapted(["h.0.up", "h.0.down", "h.1.down"])
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["h.0.down", "h.0.up", "h.1.down"]
    fresh = some_model()
    load_adapter(fresh, tmp_path)
    assert adapters(fresh).keys() == adapters(model).keys()


def test_a_regular_expression_chooses_layers(tmp_path):
    save_adapter(adapted(["h.0.up", "h.1.up"]), tmp_path)
    change(tmp_path, target_modules=r"h\.\d+\.up")
    fresh = some_model()
    load_adapter(fresh, tmp_path)
    assert list(adapters(fresh)) == ["h.0.up", "h.1.up"]


def test_adapters_can_be_loaded_in_another_type(tmp_path):
    save_adapter(adapted(), tmp_path)
    fresh = some_model()
    load_adapter(fresh, tmp_path, dtype=torch.bfloat16)
    assert all(layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16 for layer in adapters(fresh).values())


def test_an_adapter_that_is_there_takes_the_values_and_keeps_its_tensors(tmp_path):
    source, model, x = adapted(), adapted(seed=0, alpha=1, dropout=0.0), some_x(2, 6)
    save_adapter(source, tmp_path)
    held = [tensor for layer in adapters(model).values() for tensor in (layer.lora_A, layer.lora_B)]
    load_adapter(model, tmp_path)
    assert [id(tensor) for tensor in held] == [id(p) for p in model.parameters() if p.requires_grad]
    assert torch.equal(model(x), source(x))


def change(directory, **settings):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"up": 8}),
        ("alpha_pattern", {"up": 8}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["down"]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("a_setting_of_next_year", 1),
    ],
)
def test_a_setting_that_is_not_built_is_refused_by_name(tmp_path, setting, value):
    save_adapter(adapted(), tmp_path)
    change(tmp_path, **{setting: value})
    with pytest.raises(ValueError, match=f"asks for what is not built here: {setting}="):
        load_adapter(some_model(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is built"),
        ({"r": "8"}, "r='8'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"target_modules": None}, "target_modules=None"),
        ({"target_modules": "("}, r"target_modules='\('"),
        ({"target_modules": ["query_key_value"]}, r"target_modules \['query_key_value'\] matches no layer; the model has h\.0\.up"),
        ({"lora_dropout": 1.5}, r"dropout is 1\.5"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, settings, message):
    save_adapter(adapted(), tmp_path)
    change(tmp_path, **settings)
    model = some_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not adapters(model)


def test_every_key_that_does_not_fit_is_in_one_error_and_nothing_changes(tmp_path):
    save_adapter(adapted(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["base_model.model.h.1.down.lora_B.weight"]
    tensors["base_model.model.h.9.up.lora_A.weight"] = torch.zeros(3, 6)
    tensors[KEY] = torch.zeros(3, 7)
    save_file(tensors, tmp_path / WEIGHTS)
    model, x = some_model(), some_x(2, 6)
    expected = model(x)
    with pytest.raises(ValueError, match="does not fit the model") as raised:
        load_adapter(model, tmp_path)
    lines = str(raised.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing: base_model.model.h.1.down.lora_B.weight",
        "unexpected: base_model.model.h.9.up.lora_A.weight",
        f"misshapen: {KEY} is (3, 7), the model needs (3, 6)",
    ]
    assert not adapters(model) and torch.equal(model(x), expected)
    assert model.lm_head.weight.requires_grad


def test_adapters_that_the_file_does_not_have_are_in_the_error(tmp_path):
    save_adapter(adapted(["h.0.up", "h.1.up"]), tmp_path)
    with pytest.raises(ValueError, match=r"adapted in the model, but not in the file: h\.0\.down"):
        load_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"rank of h\.0\.up: 5 in the model, 3 in the file"):
        load_adapter(adapted(["h.0.up", "h.1.up"], rank=5), tmp_path)


def test_files_that_are_missing_or_broken_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json: it is not an adapter"):
        load_adapter(some_model(), tmp_path)
    save_adapter(adapted(), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        load_adapter(some_model(), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle: save it again with PEFT"):
        load_adapter(some_model(), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        load_adapter(some_model(), tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="lacks lora_alpha, r, target_modules"):
        load_adapter(some_model(), tmp_path)


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters to save"):
        save_adapter(some_model(), tmp_path)
    model = adapted()
    model.h[0].up.alpha = 7
    with pytest.raises(ValueError, match="the adapters differ in"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_both_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    umask = os.umask(0o027)
    try:
        save_adapter(adapted(), tmp_path)
    finally:
        os.umask(umask)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {WEIGHTS: 0o640, CONFIG: 0o640}


def test_a_disk_that_fills_up_leaves_the_previous_adapter_whole(tmp_path):
    first, second, x = adapted(), adapted(), some_x(2, 6)
    nn.init.normal_(second.h[0].up.lora_A)
    save_adapter(first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond the limit: the weights break off in the middle, then the configuration with a very long name in it.
    for limit, base in ((500, None), (50_000, "b" * 100_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=r"not saved.*what was there before is unchanged"):
                save_adapter(second, tmp_path, base)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    fresh = some_model().eval()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), first(x))
    save_adapter(second, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), second(x))
