"""6. The Falcon decoder: one class for all published Falcons of the first two generations (Falcon3 is a Llama).

They share one skeleton: token embedding, blocks, a last LayerNorm, a head that maps back to the vocabulary.

                      7b              40b, 180B        11B (Falcon2)     rw-1b
    positions         rotary          rotary           rotary            ALiBi
    key/value heads   1               8                8                 one a head
    norms in a block  1, shared       2, side by side  1, shared         2, one after the other
    block             x + attention(norm x) + mlp(norm x)                x = x + attention(norm x); x + mlp(norm x)
    linear bias       no              no               no                yes

**The fused projection.** Several query heads may read one key/value head, which leaves less to compute and to cache: *grouped* attention;
*multi-query*, if all heads read a single one. `query_key_value` is one linear, and the order of its rows is the first trap. Every variant
is the same picture once the heads are counted by groups: a group is one key/value head and the query heads that read it,

    rows = [kv_heads, group + 2, head_dim]        group = heads // kv_heads; the last two of a group are its K and its V

    7b     kv_heads = 1       group = heads       [1, heads + 2, head_dim]
    40b    kv_heads = 8       group = heads / 8   [8, heads / 8 + 2, head_dim]
    rw-1b  kv_heads = heads   group = 1           [heads, 3, head_dim]: q, k, v of each head

**Rotary positions** turn each pair (x[i], x[i + head_dim / 2]) of a query or key at position p by the angle p * theta^(-2i / head_dim),
so that their product depends on the distance alone. The angles are computed in float32: in bf16 position 257 is 256.

**ALiBi** adds slope * position of the key to the score instead. Falcon was trained with slopes, positions *and* their product
rounded to bf16, and adds the result before the scores are divided by sqrt(head_dim). Both are kept: exact arithmetic would be
another model, most of all beyond position 256, where bf16 counts by twos.

**Positions** count the tokens that are not masked, so a prompt padded on the left gives what it gives alone.

**The cache** keeps keys and values of past tokens, one head of each for multi-query. It is allocated once, and where
the next token goes is a tensor on the device, not a Python number: every decode step has the same shapes and the same memory, and
can be captured as a CUDA graph. What is not filled yet is masked. The first call, the prompt, looks at its own tokens alone and never
at the cache: without padding it is plain causal attention, however much was allocated.

The module names are those of Hugging Face's checkpoints, so a state dict maps one to one. Nothing here knows of 4 bits or of
LoRA: both replace the `nn.Linear`s of the blocks.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# The first Falcons were published under other names, "RefinedWebModel" (rw-1b, 7b) and "RefinedWeb" (40b).
MODEL_TYPES = ("falcon", "RefinedWebModel", "RefinedWeb")
OLD_KEYS = {"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class FalconConfig:
    """The config.json of a Falcon. The names are Hugging Face's; the values are resolved, so `num_kv_heads` is the real number."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int | None = None              # resolved: 1 for multi-query, whatever a file says
    ffn_hidden_size: int | None = None           # resolved: 4 * hidden_size where unset
    max_position_embeddings: int = 2048
    alibi: bool = False                          # False: rotary
    rope_theta: float = 10000.0
    bias: bool = False
    multi_query: bool = True                     # means nothing in the new architecture, though 11B and 180B set it
    parallel_attn: bool = True
    new_decoder_architecture: bool = False       # grouped heads; always parallel
    num_ln_in_parallel_attn: int | None = None   # resolved: 2 in the new architecture where unset, else 1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool | None = None      # None: tied, unless a checkpoint holds a head of its own
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        def resolve(name: str, value) -> None:
            object.__setattr__(self, name, value)

        for name in (*REQUIRED, "max_position_embeddings"):
            _check_count(name, getattr(self, name))
        if self.new_decoder_architecture:
            resolve("parallel_attn", True)
            resolve("num_kv_heads", self.num_kv_heads or self.num_attention_heads)
        else:
            resolve("num_kv_heads", 1 if self.multi_query else self.num_attention_heads)
        if self.num_ln_in_parallel_attn is None:
            resolve("num_ln_in_parallel_attn", 2 if self.new_decoder_architecture else 1)
        if self.ffn_hidden_size is None:
            resolve("ffn_hidden_size", 4 * self.hidden_size)
        _check_count("num_kv_heads", self.num_kv_heads)
        _check_count("ffn_hidden_size", self.ffn_hidden_size)

        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if not self.alibi and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs")
        if self.num_ln_in_parallel_attn not in ((1, 2) if self.new_decoder_architecture else (1,)):
            raise ValueError(f"num_ln_in_parallel_attn {self.num_ln_in_parallel_attn}: 1, or 2 with new_decoder_architecture")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, config: dict) -> "FalconConfig":
        """Read the dict of a config.json, as transformers 4 or 5 wrote it or as the first Falcons spelled it.

        ValueError, with key and value, for what is no Falcon or asks for what none has.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {model_type!r} is not a Falcon: expected one of {', '.join(MODEL_TYPES)} (Falcon3 is a Llama)")
        config = {key: value for key, value in config.items() if value is not None}
        for old, new in OLD_KEYS.items():
            if old in config and config.setdefault(new, config[old]) != config[old]:
                raise ValueError(f"config says {old} = {config[old]} and {new} = {config[new]}: they name the same thing")
        # The first Falcons' own code read a missing key otherwise than transformers does.
        if model_type != "falcon":
            config = {"multi_query": False, "parallel_attn": False, "new_decoder_architecture": model_type == "RefinedWeb"} | config
        # transformers 5 moved theta into a dict. A reader that misses it runs 11B with 10000 instead of 500042.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rope_parameters {rope}: only the type 'default' is supported")
        if "rope_theta" in rope:
            config["rope_theta"] = rope["rope_theta"]
        if config.get("activation", "gelu") != "gelu":
            raise ValueError(f"activation {config['activation']!r}: every published Falcon uses 'gelu'")
        if config.get("apply_residual_connection_post_layernorm"):
            raise ValueError("apply_residual_connection_post_layernorm is true: no published Falcon uses it")
        if missing := [name for name in REQUIRED if name not in config]:
            raise ValueError(f"config lacks {', '.join(missing)}")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_json(self) -> dict:
        """The dict of a config.json that transformers 4 and 5 read."""
        return {"model_type": "falcon", "architectures": ["FalconForCausalLM"], "activation": "gelu"} | asdict(self)


def _check_count(name: str, value) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: a whole number of at least 1 is needed")


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of p * theta^(-2i / head_dim), twice over: once for each half of a head."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim      # (head_dim / 2,)
    angles = positions[..., None].float() * (1.0 / theta**exponents)                          # (batch, tokens, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)                                              # (batch, tokens, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x[i], x[i + head_dim / 2]) into (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)                                  # x (batch, tokens, kv_heads, heads of a group, head_dim)
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]    # (batch, tokens, 1, 1, head_dim)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """2^(-8 i / heads) for i = 1 .. heads. A count between two powers of two takes the lower one's, then every other of the upper one's."""
    power = 2 ** math.floor(math.log2(heads))
    first = torch.arange(1, power + 1, device=device) / power                              # 1 / power, 2 / power, ... 1
    rest = (2 * torch.arange(heads - power, device=device) + 1) / (2 * power)              # 1 / 2 power, 3 / 2 power, ...
    return 2.0 ** (-8 * torch.cat((first, rest)))                                          # (heads,), float32


def alibi_bias(positions: Tensor, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """slope * position / sqrt(head_dim), with the three roundings to bf16 that Falcon was trained with."""
    slopes = alibi_slopes(heads, positions.device).bfloat16()                      # (heads,)
    bias = slopes[:, None] * positions[:, None].bfloat16()                         # (batch, heads, length), bf16
    return bias[:, :, None].to(dtype) / math.sqrt(head_dim)                        # (batch, heads, 1, length)


class KeyValueCache:
    """Keys and values of every layer for `length` tokens of each row, allocated once. For inference alone: it keeps no gradient."""

    def __init__(self, config: FalconConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, config.num_kv_heads, length, config.head_dim)
        # Zeros, not empty memory: a masked slot weighs 0 in the sum over values, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.present = torch.zeros(batch, length, device=device, dtype=torch.bool)    # which slots hold a token that is not padding
        self.filled = torch.zeros((), device=device, dtype=torch.int64)               # how many slots are taken, the same in every row
        self.empty = True                                                             # before the first call; known without asking a GPU

    def clear(self) -> None:
        """Empty again, in the same memory."""
        self.filled.zero_()
        self.present.zero_()
        self.empty = True

    def reserve(self, tokens: int, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take the next `tokens` slots for a call. Returns the slots (tokens,) and who is present (batch, length)."""
        slots = self.filled + torch.arange(tokens, device=self.filled.device)
        new = self.present.new_ones(len(self.present), tokens) if attention_mask is None else attention_mask.bool()
        self.present.index_copy_(1, slots, new)
        self.filled += tokens
        self.empty = False
        return slots, self.present

    def append(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store what a layer computed for these slots; returns all of its keys and values (batch, kv_heads, length, head_dim)."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(2, slots, key), values.index_copy_(2, slots, value)


@dataclass(frozen=True)
class Context:
    """What a call computes once and every block reads."""

    rotary: tuple[Tensor, Tensor] | None    # cosine and sine, each (batch or 1, tokens, head_dim); None with ALiBi
    mask: Tensor | None                     # (batch or 1, heads or 1, tokens, length), bool or ALiBi's bias; None: causal, nothing else
    cache: KeyValueCache | None
    past: bool                              # whether the cache held tokens before this call
    slots: Tensor                           # (tokens,): where the call's tokens stand among the keys


class FalconAttention(nn.Module):
    """x (batch, tokens, hidden_size) -> the same shape; so do the MLP and the block below."""

    def __init__(self, config: FalconConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.group = config.num_attention_heads // config.num_kv_heads
        # transformers drops attention weights only where positions are ALiBi's.
        self.dropout = config.attention_dropout if config.alibi else 0.0
        rows = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.dense(self.mix(self.query_key_value(x), context))

    def mix(self, qkv: Tensor, context: Context) -> Tensor:
        """Between the two linears, (batch, tokens, rows) -> (batch, tokens, hidden_size): each token's weighted mean of what it may see."""
        qkv = qkv.unflatten(-1, (self.kv_heads, self.group + 2, self.head_dim))          # (batch, tokens, kv_heads, group + 2, head_dim)
        query_key, value = qkv.split((self.group + 1, 1), dim=3)
        if context.rotary is not None:
            query_key = rotate(query_key, *context.rotary)
        query, key = query_key.split((self.group, 1), dim=3)
        key, value = key.squeeze(3).transpose(1, 2), value.squeeze(3).transpose(1, 2)    # (batch, kv_heads, tokens, head_dim)
        if context.cache is not None:
            stored = context.cache.append(self.layer, context.slots, key, value)         # (batch, kv_heads, length, head_dim)
            key, value = stored if context.past else (key, value)
        if query.shape[1] == 1:
            return self.mix_one(query.squeeze(1), key, value, context.mask)
        query = query.flatten(2, 3).transpose(1, 2)                                      # (batch, heads, tokens, head_dim)
        key, value = self.for_every_head(key), self.for_every_head(value)                # (batch, heads, length, head_dim)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=context.mask, is_causal=context.mask is None, dropout_p=self.dropout if self.training else 0.0
        )
        return mixed.transpose(1, 2).flatten(2)                                          # (batch, tokens, hidden_size)

    def mix_one(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The same for one token a row, query (batch, kv_heads, group, head_dim): a group's queries read their key head as tokens would.

        Not only because no key need be repeated: given one token and a view of one key head for all, PyTorch 2.11's kernel for
        float32 and for masks takes the wrong row's keys in every batch row but the first, from more than 64 heads on.
        """
        if mask is not None and mask.shape[1] > 1:
            mask = mask.view(len(mask), self.kv_heads, self.group, -1)                   # ALiBi's, of every head
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return mixed.flatten(1)[:, None]                                                 # (batch, 1, hidden_size)

    def for_every_head(self, x: Tensor) -> Tensor:
        # A view for multi-query, no copy. `enable_gqa=True` would say the same, but rules out the fused kernels that take a mask.
        return x[:, :, None].expand(-1, -1, self.group, -1, -1).flatten(1, 2)


class FalconMLP(nn.Module):
    def __init__(self, config: FalconConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))    # the exact GELU, by erf


class FalconBlock(nn.Module):
    def __init__(self, config: FalconConfig, layer: int):
        super().__init__()
        self.config = config
        if not config.parallel_attn:
            names = ("input_layernorm", "post_attention_layernorm")
        elif config.num_ln_in_parallel_attn == 2:
            names = ("ln_attn", "ln_mlp")
        else:
            names = ("input_layernorm",)
        for name in names:
            self.add_module(name, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon))
        self.self_attention = FalconAttention(config, layer)
        self.mlp = FalconMLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        config = self.config
        if not config.parallel_attn:
            # That the first rate is attention's is transformers' reading; every published config has 0 for both.
            attended = self.self_attention(self.input_layernorm(x), context)
            x = x + F.dropout(attended, config.attention_dropout, self.training)
            return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), config.hidden_dropout, self.training)
        if config.num_ln_in_parallel_attn == 2:
            for_attention, for_mlp = self.ln_attn(x), self.ln_mlp(x)
        else:
            for_attention = for_mlp = self.input_layernorm(x)
        change = self.mlp(for_mlp) + self.self_attention(for_attention, context)
        return x + F.dropout(change, config.hidden_dropout, self.training)


class Falcon(nn.Module):
    """Token ids (batch, tokens) -> logits (batch, tokens, vocab_size)."""

    def __init__(self, config: FalconConfig):
        super().__init__()
        self.config = config
        # Trade time for memory in training: keep the input of each block and compute the rest again in the backward.
        self.checkpointing = False
        self.transformer = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
            "h": nn.ModuleList(FalconBlock(config, layer) for layer in range(config.num_hidden_layers)),
            "ln_f": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings is not False:
            self.lm_head.weight = self.transformer.word_embeddings.weight
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Logits. `attention_mask` (batch, tokens) is 0 on padding; with a cache it speaks of this call's tokens alone.

        Where records share a row, it is 1 for the tokens of the first, 2 for those of the second, ...: a token sees only tokens with its
        number. Positions do not restart at a record: rotary and ALiBi depend on differences alone (up to ALiBi's rounding, beyond 256).

        A batch padded on the right needs no mask: no token looks to its right. Without one attention takes its fastest path.
        """
        return self.lm_head(self.hidden_states(input_ids, attention_mask, cache))

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """What the head reads, (batch, tokens, hidden_size): for a loss in chunks, or a head on the last token alone."""
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} is not of input_ids' shape {tuple(input_ids.shape)}")
        x = self.transformer.word_embeddings(input_ids)                               # (batch, tokens, hidden_size)
        context = self.context(input_ids.shape[1], attention_mask, cache, x)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, context, use_reentrant=False) if recompute else block(x, context)
        return self.transformer.ln_f(x)

    def context(self, tokens: int, attention_mask: Tensor | None, cache: KeyValueCache | None, like: Tensor) -> Context:
        """What every block wants to know of the next `tokens` tokens; `like` gives device and dtype, attention_mask is as in forward."""
        config, record = self.config, attention_mask
        past = cache is not None and not cache.empty
        slots = torch.arange(tokens, device=like.device)
        if cache is not None:
            slots, present = cache.reserve(tokens, record)
            record = present if past else record
        # (1, tokens) or (batch, length); padding stands at 0
        positions = slots[None] if record is None else ((record > 0).cumsum(dim=1) - 1) * (record > 0)
        mask = None
        if record is not None or config.alibi:
            key_slots = torch.arange(positions.shape[1], device=like.device)
            mask = (key_slots <= slots[:, None])[None, None]                          # (1, 1, tokens, length)
            if record is not None:
                # Padding sees padding, itself at least: a row of scores that are all masked would be NaN.
                mask = mask & (record[:, slots, None] == record[:, None])[:, None]    # (batch, 1, tokens, length)
        rotary = None
        if config.alibi:
            bias = alibi_bias(positions, config.num_attention_heads, config.head_dim, like.dtype)
            mask = bias.masked_fill(~mask, -torch.inf)                                # (batch, heads, tokens, length)
        else:
            rotary = rotary_angles(positions[:, slots], config.head_dim, config.rope_theta, like.dtype)
        return Context(rotary, mask, cache, past, slots)

    def new_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty cache for `length` tokens of `batch` rows, on the model's device and in its dtype."""
        weight = self.transformer.word_embeddings.weight
        return KeyValueCache(self.config, batch, length, weight.device, weight.dtype)
