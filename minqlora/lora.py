"""4. LoRA: what is trained instead of the weight (QLoRA Eq. 3), and its files.

    Y = X W^T + b + scale · (dropout(X) A^T) B^T        scale = alpha / rank

W, of (out_features, in_features), is frozen. What training adds to it is the product of two thin matrices, a change of low rank: A, of
(rank, in_features), and B, of (out_features, rank). At rank 64 a square matrix of 4096 has 0.5 million values to train in place of 16.8,
and Adam's two moments are as much smaller. Dividing by the rank keeps the size of the change when the rank is another.

A starts random, with the bound 1/sqrt(in_features) of PyTorch's own linear layers, and B starts at zero: at the first step the model is
the base, exactly. The initial values come from PyTorch's CPU generator on every machine, so a seed gives the same adapters with and
without a GPU.

Dropout acts on the input of A alone; the base sees all of X.

**Types.** The paper computes in bfloat16. Here A and B rest in float32, so that small updates are not rounded away, and are cast to the
type of X for the product; their gradients arrive in float32. Over a float32 X nothing is cast.

**Files.** An adapter is saved as PEFT, Hugging Face's library of adapters, saves it, and PEFT's files load here:

    adapter_config.json         r, lora_alpha, lora_dropout, target_modules, ...
    adapter_model.safetensors   base_model.model.NAME.lora_A.weight and .lora_B.weight for every adapted layer NAME

Whatever else a configuration may ask for (DoRA, trained biases, other ranks for some layers, ...) changes the product above. It is
refused by its name, since an adapter that loads and then computes something else is worse than none.

Both files are written beside the old ones and take their place only when they are whole: a disk that fills up leaves the previous
adapter as it was.
"""

import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """x (..., in_features) -> base(x) + scale · (dropout(x) A^T) B^T, (..., out_features) (QLoRA Eq. 3).

    base is any layer with in_features, out_features and a weight: an nn.Linear, or one in 4 bits. It is frozen. A and B rest in dtype.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank is {rank}; it must be an integer of at least 1")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha}; it must be greater than 0, and finite")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        device = base.weight.device
        bound = base.in_features**-0.5
        A = torch.empty(rank, base.in_features, device="meta" if device.type == "meta" else "cpu").uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A.to(device, dtype))                                                # (rank, in_features)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=dtype))   # (out_features, rank)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)                                                       # (..., out_features)
        xa = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))              # (..., rank)
        return torch.add(y, F.linear(xa, self.lora_B.to(x.dtype)), alpha=self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its name, whatever its class: a subclass of nn.Linear too, or one in 4 bits.

    One with an adapter stands there once, as the LoRALinear, and not again as its base.
    """
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoRALinear))
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not name.startswith(adapted)
    }


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def matches(name: str, target: str) -> bool:
    """PEFT's rule: a target is a whole name, or its end after a dot ("dense" is h.0.self_attention.dense, not h.0.mlp.dense_h_to_4h)."""
    return name == target or name.endswith("." + target)


def chosen(name: str, targets: str | list[str]) -> bool:
    """Whether a configuration's target_modules mean this layer: a regular expression for the whole name, or a list of targets."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(matches(name, target) for target in targets)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def save_adapter(model: nn.Module, directory, base: str | None = None, metadata: dict[str, str] | None = None) -> None:
    """Write the adapters of a model in PEFT's format.

    base is the name or path of the model they belong to. metadata (a hash of the base, say) goes into the safetensors header, where PEFT
    ignores it. ValueError if there are none, or if they differ in rank, alpha or dropout; OSError if they cannot be written.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapters to save; add_lora puts them in")
    settings = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"the adapters differ in (rank, alpha, dropout): {sorted(settings)}; a configuration has room for one")
    rank, alpha, dropout = settings.pop()

    # Short names say the same wherever all layers of that name are adapted; else each layer is named in full.
    short = {name.rpartition(".")[2] for name in layers}
    meant = [name for name in linears(model) if any(matches(name, target) for target in short)]
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(short if len(meant) == len(layers) else layers),
        "task_type": "CAUSAL_LM",
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    # Bytes, not save_file: its files can be read by their owner alone, whatever the umask says.
    files = {
        WEIGHTS: save(tensors, metadata={"format": "pt"} | (metadata or {})),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in files.items():
            with open(directory / f"{name}.new", "wb") as file:
                file.write(content)
                file.flush()
                # On the disk before the old ones go: a file system may take a write now and find no room for it later.
                os.fsync(file.fileno())
    except BaseException as error:
        for name in files:
            (directory / f"{name}.new").unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"the adapter was not saved in {directory}; what was there before is unchanged: {error}") from error
        raise
    for name in files:
        os.replace(directory / f"{name}.new", directory / name)


# What describes an adapter, what PEFT writes without meaning for the product, and the initializations that leave the base as it is.
# Any other setting that is switched on is refused.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"}
WITHOUT_MEANING = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")


def read_config(directory: Path) -> dict:
    """adapter_config.json, once it is sure that LoRALinear computes what it describes."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: it is not an adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type') if isinstance(config, dict) else config!r}; only LORA is built")
    missing = sorted(READ - {"lora_dropout"} - config.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    numbers = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout") if key in config}
    wrong = [f"{key}={value!r}" for key, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    targets = config["target_modules"]
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        wrong.append(f"target_modules={targets!r}")
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        wrong.append(f"target_modules={targets!r} ({error})")
    if wrong:
        raise ValueError(f"{path}: not what the setting needs: {', '.join(wrong)}")
    config = {"lora_dropout": 0.0, "bias": "none", "init_lora_weights": True} | config
    refused = [key for key, value in config.items() if value and key not in READ | WITHOUT_MEANING | {"bias", "init_lora_weights"}]
    if config["bias"] != "none":
        refused.append("bias")
    if config["init_lora_weights"] not in INITIALIZATIONS:
        refused.append("init_lora_weights")
    if refused:
        settings = ", ".join(f"{key}={config[key]!r}" for key in refused)
        raise ValueError(f"{path} asks for what is not built here: {settings}")
    return config


def load_adapter(model: nn.Module, directory, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Read adapters in PEFT's format into a model. Returns the metadata of the file.

    The model is frozen and its layers are wrapped as by add_lora, with adapters in dtype; a model that has adapters on the same layers
    already keeps them and takes the values. Nothing changes unless every key fits: else a ValueError names each that does not.
    """
    directory = Path(directory)
    config = read_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {WEIGHTS}; one saved as adapter_model.bin is a pickle: save it again with PEFT")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error

    targets, rank, known = config["target_modules"], config["r"], linears(model)
    layers = {name: layer for name, layer in known.items() if chosen(name, targets)}
    if not layers:
        raise ValueError(f"{directory / CONFIG}: target_modules {targets} matches no layer; the model has {', '.join(known)}")
    expected = {}
    for name, layer in layers.items():
        expected[f"{PREFIX}{name}.lora_A.weight"] = (rank, layer.in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (layer.out_features, rank)
    problems = [f"missing: {key}" for key in expected if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in expected]
    for name, layer in adapters(model).items():
        if name not in layers:
            problems.append(f"adapted in the model, but not in the file: {name}")
        if layer.rank != rank:
            problems.append(f"rank of {name}: {layer.rank} in the model, {rank} in the file")
    problems += [
        f"misshapen: {key} is {tuple(tensors[key].shape)}, the model needs {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model:\n  " + "\n  ".join(problems))

    alpha, dropout = config["lora_alpha"], config["lora_dropout"]
    new = {name: LoRALinear(layer, rank, alpha, dropout, dtype) for name, layer in layers.items() if not isinstance(layer, LoRALinear)}
    model.requires_grad_(False)
    for name, layer in new.items():
        replace(model, name, layer.train(layers[name].training))
    # Adapters that were there keep their tensors, which an optimizer may hold, and take the values.
    for name, layer in adapters(model).items():
        layer.alpha, layer.dropout = alpha, dropout
        for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            parameter.detach().copy_(tensors[f"{PREFIX}{name}.{part}.weight"])
            parameter.requires_grad_()
    return metadata
