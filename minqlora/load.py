"""7. Safetensors on disk -> a Falcon in 4 bits, one tensor at a time.

A checkpoint of falcon-7b is 14 GB; the model it becomes is 4 GB. Reading the one and then making the other would need both. So:

1. The model is built on the meta device: every shape is known, and no memory is taken.
2. The files are mapped, not read, and every key is accounted for before the first tensor is touched: what is missing, what is
   not expected and what has another shape stands together in one error.
3. Parameter by parameter: one tensor goes to the device and, if it is the weight of a linear of a block, is quantized there. The 16-bit
   copy is gone before the next one comes. Embedding, norms and head are cast to `dtype` and stay in 16 (or 32) bits.

**One file or many.** `model.safetensors`, or shards with `model.safetensors.index.json`, whose `weight_map` says which key is in which
shard. A pickle (`.bin`) is refused: opening one can run any code.

**A head of its own or not.** Most Falcons use the embedding as head, but some of their files hold it twice. The config decides
where it says so (`tie_word_embeddings`); where it says nothing, the file does: a head that differs from the embedding is a head of its own.

**What old files hold more.** The tables of rotary frequencies (`inv_freq`) once were saved with the weights. They are computed here.

Saving goes the other way, in Hugging Face's layout, which transformers opens.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from minqlora.falcon import Falcon, FalconConfig
from minqlora.linear4bit import Linear4bit
from minqlora.nf4 import NF4
from minqlora.qlora import block_linears

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
# What is fetched from a hub: never a pickle, never code.
CONFIGS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
FETCHED = ["*.safetensors", INDEX, *CONFIGS]


def load_falcon(
    directory: str | Path,
    quantize: bool = True,
    code: Tensor = NF4,
    blocksize: int = 64,
    double_quant: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Falcon:
    """Load a Falcon, in eval mode, from a directory or from Hugging Face's hub by its name.

    quantize: the linears of the blocks become 4-bit, as Linear4bit.from_weight makes them with code, blocksize and double_quant. dtype is
    that of everything else; None: bf16 where it is fast, else float32. FileNotFoundError for what is not there; ValueError for what is
    damaged or no Falcon, with every key that is missing, unexpected or misshapen.
    """
    directory, device = fetch(directory), torch.device(device)
    dtype = fast_dtype(device) if dtype is None else dtype
    where = open_checkpoint(directory)
    config = _settle_head(FalconConfig.from_json(read_json(directory / "config.json")), where)
    with torch.device("meta"):
        model = Falcon(config)
    _account_for_every_key(model, where, directory)

    linears = block_linears(model) if quantize else {}
    # The bar comes after a second, so a small model loads without one; on no terminal there is none.
    keys = [key for key, _ in model.named_parameters()]
    for key in tqdm(keys, desc=f"loading {directory.name}", unit="tensor", leave=False, delay=1, disable=None):
        name, _, leaf = key.rpartition(".")
        if name not in linears:
            tensor = where[key].get_tensor(key).to(device, dtype, copy=True)
            setattr(model.get_submodule(name), leaf, nn.Parameter(tensor))
        # A bias goes along with its weight.
        elif leaf == "weight":
            # The weight is quantized from what the file holds; a cast to `dtype` before would round it twice.
            weight = where[key].get_tensor(key).to(device)
            bias = None if linears[name].bias is None else where[f"{name}.bias"].get_tensor(f"{name}.bias").to(device, dtype, copy=True)
            try:
                layer = Linear4bit.from_weight(weight, bias, code, blocksize, double_quant)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
            model.set_submodule(name, layer)
            del weight
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    return model.eval()


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that multiplies it in hardware (compute capability 8.0, Ampere, and newer); float32 elsewhere."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def fetch(name: str | Path) -> Path:
    """A directory as it is; any other name from a hub: its safetensors, config and tokenizer, and nothing else."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    # Hub names are OWNER/NAME. Whatever else is a path with a slip in it, and nobody's server needs to hear of it.
    if str(name).count("/") > 1 or str(name).startswith((".", "~", "/")):
        raise FileNotFoundError(f"{name}: no such directory")
    try:
        directory = Path(snapshot_download(str(name), allow_patterns=FETCHED))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name}: no such directory, and it could not be fetched from the hub: {error}") from error
    if not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(f"{name}: the hub has no safetensors of it.\n{_how_to_convert(name)}")
    return directory


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer.json of a model, without the padding and cutting that it may ask for: batches do both themselves."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # tokenizers raises bare Exceptions.
    except Exception as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def eos_token_id(directory: str | Path) -> int:
    """The token that ends an answer: generation_config.json's, else config.json's; of several the first."""
    for path in (Path(directory) / "generation_config.json", Path(directory) / "config.json"):
        eos = read_json(path).get("eos_token_id") if path.exists() else None
        if eos is not None:
            return eos[0] if isinstance(eos, list) else eos
    raise ValueError(f"{directory}: neither generation_config.json nor config.json says eos_token_id")


def read_json(path: Path) -> dict:
    """The object in a JSON file; the error names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def open_checkpoint(directory: Path) -> dict:
    """Map every file of a checkpoint. Returns for each key the open file that holds it."""
    if (directory / SINGLE).is_file():
        weight_map, shards = {}, [SINGLE]
    elif (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{directory / INDEX}: weight_map is no object of key: file name")
        shards = sorted(set(weight_map.values()))
        # The names come from the index, which may come from anyone: a path could lead to any file of this machine.
        outside = [shard for shard in shards if Path(shard).name != shard or shard == ".." or "\\" in shard]
        if outside:
            raise ValueError(f"{directory / INDEX} points outside its directory: {', '.join(map(repr, outside))}")
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise FileNotFoundError(f"{directory}: {len(missing)} of {len(shards)} shards are missing: {', '.join(map(repr, missing))}")
    else:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        found = f" It holds {', '.join(pickles)}." if pickles else ""
        raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}.{found}\n{_how_to_convert(directory)}")

    where = {}
    for shard in shards:
        try:
            file = safe_open(directory / shard, framework="pt", device="cpu")
        except SafetensorError as error:
            size = (directory / shard).stat().st_size
            raise ValueError(f"{directory / shard} ({size} bytes) is cut short or damaged; get it again: {error}") from error
        where |= {key: file for key in file.keys() if weight_map.get(key, shard) == shard}  # noqa: SIM118
    return where


def _how_to_convert(name: str | Path) -> str:
    return (
        "Only safetensors are read: a pickle (.bin) can run any code when it is opened."
        " If you trust where it comes from, convert it once:\n"
        f"  python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{name}').save_pretrained('CONVERTED')\""
    )


def _settle_head(config: FalconConfig, where: dict) -> FalconConfig:
    """Decide whether the head is the embedding: by the config where it says so, else by the file. ValueError where they disagree."""
    tied = config.tie_word_embeddings
    if tied is not False:
        same = HEAD not in where or EMBEDDING not in where or _equal(where, HEAD, EMBEDDING)
        if tied and not same:
            raise ValueError(f"config says tie_word_embeddings: true, but {HEAD} differs from {EMBEDDING}")
        tied = same
    return dataclasses.replace(config, tie_word_embeddings=tied)


def _equal(where: dict, first: str, second: str, rows: int = 4096) -> bool:
    """Whether two matrices of the checkpoint are the same, read a few rows at a time."""
    a, b = where[first].get_slice(first), where[second].get_slice(second)
    return a.get_shape() == b.get_shape() and all(
        torch.equal(a[row : row + rows], b[row : row + rows]) for row in range(0, a.get_shape()[0], rows)
    )


def _account_for_every_key(model: Falcon, where: dict, directory: Path) -> None:
    """One ValueError for all keys that are missing, unexpected, or of another shape or no float type."""
    expected = {key: list(parameter.shape) for key, parameter in model.named_parameters()}
    problems = []
    for key, shape in expected.items():
        if key not in where:
            problems.append(f"missing     {key} {shape}")
            continue
        found = where[key].get_slice(key)
        if found.get_shape() != shape:
            problems.append(f"misshapen   {key} {found.get_shape()}, expected {shape}")
        elif found.get_dtype() not in FLOATS:
            problems.append(f"wrong type  {key} holds {found.get_dtype()}, expected one of {', '.join(FLOATS)}")
    # A tied head was found equal to the embedding by now, or would not be tied.
    ignored = {HEAD} if model.config.tie_word_embeddings else set()
    problems += [f"unexpected  {key}" for key in sorted(where.keys() - expected.keys() - ignored) if not key.endswith(".inv_freq")]
    if problems:
        raise ValueError(f"{directory} does not hold the Falcon that its config.json describes:\n  " + "\n  ".join(problems))


def save_falcon(model: Falcon, directory: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write a Falcon in 16 or 32 bits as Hugging Face's layout has it, sharded where it is larger than `shard_bytes`.

    Everything is written beside its place first, so a full disk (OSError) leaves what was there before. ValueError for a model in 4 bits
    or with adapters.
    """
    directory = Path(directory)
    config = dataclasses.replace(model.config, tie_word_embeddings=model.lm_head.weight is model.transformer.word_embeddings.weight)
    with torch.device("meta"):
        plain = {key: parameter.shape for key, parameter in Falcon(config).named_parameters()}
    tensors = dict(model.named_parameters())    # a tied head stands under the embedding's name alone
    if {key: parameter.shape for key, parameter in tensors.items()} != plain:
        raise ValueError("the model holds 4-bit weights or adapters; make a plain Falcon of it first, with merge_lora")

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        beside = Path(temporary)
        for name, shard in zip(names, shards, strict=True):
            # transformers refuses a file that does not say which framework's row order it has.
            try:
                save_file({key: tensor.detach().contiguous() for key, tensor in shard.items()}, beside / name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{directory} could not be written, and is as it was: {error}") from error
        files = list(names)
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.nbytes for tensor in tensors.values())
            _write_json(beside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            files.append(INDEX)
        dtype = str(model.transformer.word_embeddings.weight.dtype).removeprefix("torch.")
        _write_json(beside / "config.json", config.to_json() | {"torch_dtype": dtype})
        for name in [*files, "config.json"]:
            # safetensors leaves its files to their owner alone; a model is read by whoever may read its config.
            shutil.copymode(beside / "config.json", beside / name)
            # On the disk before the old ones go: a file system may take a write now and find no room for it later.
            with open(beside / name, "rb+") as file:
                os.fsync(file.fileno())
        # An index goes before its shards and comes after them: at no moment does one stand over shards of two models.
        (directory / INDEX).unlink(missing_ok=True)
        for name in [*files, "config.json"]:
            os.replace(beside / name, directory / name)
    for stale in {path.name for path in directory.glob("model*.safetensors")} - set(files):
        (directory / stale).unlink()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
