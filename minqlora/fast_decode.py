"""16. Decoding on a GPU: one step, recorded once, replayed for each token.

generate.py is the definition and falcon.py its model; this is their version for a GPU. A decode step of Falcon-7B reads 3.4 GB of packed
weights and 0.6 GB of head, 1.3 ms at the 3 TB/s of an H100, and consists of some 400 launches, which take Python far longer. So the
step, from the ids to the logits, is recorded as a CUDA graph. A replay launches the same kernels on the same addresses, without Python: so
the cache stays where it is, how full it is stands on the GPU, and what changes between steps is copied into place. What else it takes:

**A step waits for nobody.** The host launches step t + 1 before it looks at token t, so the GPU has work while a token is decoded,
printed and compared with eos. Ids reach the host by a copy of their own into pinned memory, with an event behind it: who reads
token t waits for token t, and not for what was launched after it. An answer that ends has cost one step too many, and nothing else:
tokens are drawn by generate.py's own `sample`, outside the recording, in the same order from the same generator.

**Fewer launches** than the block written out has: `kernels/decode.py` adds a block's results to the residual and norms the sum, and adds
the LoRA part on the way into GELU; `kernels/decode_attention.py` turns query and key, writes the cache and attends, over the
slots that are filled at that time and no others.

**Streams.** The parallel block has two chains that do not need each other until the next norm; the MLP's is the long one. Product after
product leaves the GPU half idle at every change, so the two run side by side (h = norm(x), g = gelu(up), a = attention(qkv), A and B
the adapters'):

    main     norm -> up ---------------------------> + B_up, GELU -> down --------------------> sum, in the next norm
    side 0            -> qkv -> attention -> dense -------------------------------------------'
    side 1   -> h A^T '                  '-> a A^T                -> g A^T -> B_dense, B_down -'

**Adapters off the long chain.** At rank 64 they add 6 % to what is read, but eight small products a block, one after the other, would cost
far more. A of up and qkv stand above each other and are one product. What LoRA adds to up is added on the way into GELU; what it adds to
down and dense is one product too, and a third part of the sum. qkv adds its part inside its own product, and waits for h A^T: no kernel
follows that could add it, and this chain has time. The products read copies in the model's dtype, 2 bytes a value of the adapter, B times s
= alpha / rank, refreshed at each call.

**The ladder**, ms a step, Falcon-7B in 4 bits on one H100, one row, recorded and replayed; in brackets with an adapter of rank 64. What
concerns adapters alone has one number:

    one stream                                                              2.9
    attention beside up, both before GELU; down and dense side by side      2.50  (3.4)
    a kernel's weights are on their way before the kernel before has ended  2.46  (3.3)   `after_previous` in kernels/few_rows.py
    x A^T in one launch; cuBLAS splits it and adds in a second                    (3.0)
    the side streams have the higher priority                                2.29  (2.89)
    attention and dense are waited for by the next norm, not by GELU        2.34  (2.73)  dearer without an adapter, cheaper with one
    B of dense and down in one launch of ours, behind all else                    (2.49)
    h A^T on side 1                                                               (2.38)
    B of dense and down by GELU's kernel, not by one of its own                   (2.44)  dearer, but less code: what runs

**The prompt** goes through the same blocks, all its tokens as rows, with falcon.py's attention and on one stream, unrecorded: prompts come
in every length. A short one is bound by what Python can launch, and the blocks here launch less than the written-out ones.

**What stays.** A model in eval mode keeps its last decoder: the copies, the cache, the recording; the next call with as many rows and
no more tokens starts at once. A model in training mode is on its way to be trained, where memory is dear: asked then, it keeps nothing and
forgets what it kept.

On a CPU the same steps run unrecorded and every kernel's place is taken by what defines it; that is how they are tested without a GPU.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora.falcon import Falcon, FalconBlock, alibi_bias, rotary_angles
from minqlora.generate import sample
from minqlora.lora import LoRALinear

INNER_ROWS = 4        # up to this many rows one launch of ours beats cuBLAS, which splits a small product and adds in a second launch
ROUND_LENGTH = 256    # a cache is made a little longer than asked for, so that the next call fits too


def add_norm(x: Tensor, added: list[Tensor], norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + added, and its norm: (rows, hidden_size) each."""
    if x.is_cuda:
        from minqlora.kernels.decode import add_norm as kernel

        return kernel(x, added, norm.weight, norm.bias, norm.eps)
    x = sum(added, x)
    return x, norm(x)


def gelu(u: Tensor, xa: Tensor | None, B: Tensor | None) -> Tensor:
    """gelu(u + xa B^T)"""
    if u.is_cuda:
        from minqlora.kernels.decode import gelu as kernel

        return kernel(u, xa, B)
    return F.gelu(u if xa is None else torch.addmm(u, xa, B.T))    # (rows, ffn_hidden_size)


def inner(x: Tensor, A: Tensor, ranks: list[int]) -> list[Tensor]:
    """x A^T in pieces: (rows, rank) each"""
    if x.is_cuda and len(x) <= INNER_ROWS:
        from minqlora.kernels.decode import inner as kernel

        return kernel(x, A, ranks)
    return list(torch.mm(x, A.T).split(ranks, dim=1))


def outer(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of xa B^T: (rows, out_features)"""
    if pairs[0][0].is_cuda:
        from minqlora.kernels.decode import outer as kernel

        return kernel(pairs)
    return sum(torch.mm(xa, B.T) for xa, B in pairs)


def product(base: nn.Module, x: Tensor, xa: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """base(x) + xa B^T, in one product where the base is in 4 bits; base(x) where xa is None."""
    if xa is None:
        return base(x)
    return torch.addmm(base(x), xa, B.T) if isinstance(base, nn.Linear) else base(x, xa.contiguous(), B)


class Linears:
    """One linear, or some that share an input, with their A above each other; adapted or not."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype):
        self.bases = [module.base if isinstance(module, LoRALinear) else module for module in modules]
        self.adapters = [module if isinstance(module, LoRALinear) else None for module in modules]
        self.ranks = [0 if adapter is None else adapter.rank for adapter in self.adapters]

        def empty(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=self.bases[0].weight.device)

        self.A = empty(sum(self.ranks), self.bases[0].in_features)
        self.Bs = [empty(base.out_features, rank) for base, rank in zip(self.bases, self.ranks, strict=True)]

    def refresh(self) -> None:
        """Take over what the adapters are now."""
        for adapter, A, B in zip(self.adapters, self.A.split(self.ranks), self.Bs, strict=True):
            if adapter is not None:
                A.copy_(adapter.lora_A)
                torch.mul(adapter.lora_B, adapter.scale, out=B)

    def inner(self, x: Tensor) -> list[Tensor | None]:
        """x A^T (rows, rank) for each of the linears; None without an adapter."""
        if not any(self.ranks):
            return [None] * len(self.ranks)
        found = iter(inner(x, self.A, [rank for rank in self.ranks if rank]))
        return [next(found) if rank else None for rank in self.ranks]

    def __call__(self, x: Tensor) -> Tensor:
        """Of a single linear: all of its output."""
        (base,), (xa,), (B,) = self.bases, self.inner(x), self.Bs
        return product(base, x, xa, B)


class DecodeBlock:
    """A FalconBlock over rows, each a token. What it adds to the residual is handed on, for the next norm to add."""

    def __init__(self, block: FalconBlock, dtype: torch.dtype):
        self.parallel, self.attention = block.config.parallel_attn, block.self_attention
        up, down = block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h
        qkv, dense = block.self_attention.query_key_value, block.self_attention.dense
        readers = [[up], [qkv]]
        if not self.parallel:
            self.norms = [block.input_layernorm, block.post_attention_layernorm]
        elif block.config.num_ln_in_parallel_attn == 2:
            self.norms = [block.ln_mlp, block.ln_attn]
        else:
            self.norms, readers = [block.input_layernorm], [[up, qkv]]
        self.readers, self.down, self.dense = [Linears(group, dtype) for group in readers], Linears([down], dtype), Linears([dense], dtype)
        self.groups = [*self.readers, self.down, self.dense]

    def __call__(self, x: Tensor, added: list[Tensor], decoder: "Decoder") -> tuple[Tensor, list[Tensor]]:
        return (self.side_by_side if self.parallel else self.in_sequence)(x, added, decoder)

    def side_by_side(self, x, added, decoder):
        up, qkv = (base for group in self.readers for base in group.bases)
        B_up, B_qkv = (B for group in self.readers for B in group.Bs)
        x, h = add_norm(x, added, self.norms[0])                                      # (rows, hidden_size)
        h_attention = h if len(self.norms) == 1 else add_norm(x, [], self.norms[1])[1]
        # What two streams touch stays in a variable until they have joined: the allocator knows only the stream that a tensor was made on,
        # and would give its memory away while another one still reads it.
        with decoder.beside(1):
            # One group of readers where the norm is shared, and then one input.
            xa_up, xa_qkv = (xa for group, some in zip(self.readers, (h, h_attention), strict=False) for xa in group.inner(some))
            inner_done = decoder.mark()
        with decoder.beside(0):
            if xa_qkv is not None:
                decoder.wait(inner_done)
            mixed = decoder.attend(self.attention, product(qkv, h_attention, xa_qkv, B_qkv))
            mixed_done = decoder.mark()
            attended = self.dense.bases[0](mixed)
        with decoder.beside(1):
            decoder.wait(mixed_done)
            (xa_dense,) = self.dense.inner(mixed)
        u = product(up, h)                                                            # (rows, ffn_hidden_size)
        if xa_up is not None:
            decoder.wait(inner_done)
        g = gelu(u, xa_up, B_up)
        with decoder.beside(1):
            (xa_down,) = self.down.inner(g)
            pairs = [(xa, group.Bs[0]) for xa, group in ((xa_dense, self.dense), (xa_down, self.down)) if xa is not None]
            corrected = [outer(pairs)] if pairs else []                               # (rows, hidden_size)
        fed = self.down.bases[0](g)
        decoder.join()
        return x, [attended, fed, *corrected]

    def in_sequence(self, x, added, decoder):
        up, qkv = self.readers
        x, h = add_norm(x, added, self.norms[0])
        x, h = add_norm(x, [self.dense(decoder.attend(self.attention, qkv(h)))], self.norms[1])
        g = gelu(product(up.bases[0], h), *up.inner(h), up.Bs[0])
        return x, [self.down(g)]


class Decoder:
    """A decode step of a Falcon for `batch` rows over a cache of `length` tokens; on a GPU a recording of it."""

    def __init__(self, model: Falcon, batch: int, length: int):
        config, weight = model.config, model.transformer.word_embeddings.weight
        self.batch, self.length, self.addresses = batch, length, addresses(model)
        self.blocks = [DecodeBlock(block, weight.dtype) for block in model.transformer.h]
        self.cache = model.new_cache(batch, length)
        self.ids = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.graph = self.logits = self.context = self.last = None
        self.streams = []
        if not weight.is_cuda:
            return
        # Of higher priority: their programs take the first places that the long chain's leave.
        self.streams = [torch.cuda.Stream(weight.device, priority=-1) for _ in range(2)]
        # Which position each slot's token has, -1 for padding and free slots; and the one that comes next in each row.
        self.positions = torch.full((batch, length), -1, dtype=torch.int32, device=weight.device)
        self.next = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        every = torch.arange(length, device=weight.device)
        if config.alibi:
            self.rotary = None
            self.bias = alibi_bias(every[None], config.num_attention_heads, config.head_dim, weight.dtype)[0, :, 0]    # (heads, length)
        else:
            half = config.head_dim // 2
            self.rotary = [table[:, :half].contiguous() for table in rotary_angles(every, config.head_dim, config.rope_theta, weight.dtype)]
            self.bias = None

    def fits(self, model: Falcon, batch: int, length: int) -> bool:
        """Whether the recording is of this model as it is now: modules may have been replaced, by merge_lora or load_adapter."""
        return batch == self.batch and length <= self.length and self.addresses == addresses(model)

    def refresh(self) -> None:
        for block in self.blocks:
            for group in block.groups:
                group.refresh()

    def prefill(self, model: Falcon, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The prompts into the cache; logits (batch, vocab_size) of the token behind each."""
        if input_ids.is_cuda and self.graph is None:
            self.record(model)
        self.cache.clear()
        tokens = input_ids.shape[1]
        self.context = model.context(tokens, attention_mask, self.cache, model.transformer.word_embeddings.weight)
        # One stream: products of so many rows fill the GPU one by one.
        streams, self.streams = self.streams, []
        try:
            x, added = self.through_blocks(model, input_ids.flatten())                # (batch * tokens, hidden_size) each
        finally:
            self.streams, self.context = streams, None
        if input_ids.is_cuda:
            present = self.cache.present
            self.positions.copy_(torch.where(present, present.cumsum(dim=1) - 1, -1))
            self.next.copy_(present.sum(dim=1))
        x, *added = (part[tokens - 1 :: tokens].contiguous() for part in (x, *added))   # of each row's last token: (batch, hidden_size)
        return model.lm_head(add_norm(x, added, model.transformer.ln_f)[1])

    def forward(self, model: Falcon) -> Tensor:
        """self.ids (batch,), one token a row -> logits (batch, vocab_size). On a GPU nothing here waits, and every shape is fixed."""
        cache = self.cache
        if self.ids.is_cuda:
            self.positions.index_copy_(1, cache.filled[None], self.next[:, None])
        else:
            self.context = model.context(1, None, cache, model.transformer.word_embeddings.weight)
        x, added = self.through_blocks(model, self.ids)                               # (batch, hidden_size) each
        _, h = add_norm(x, added, model.transformer.ln_f)
        if self.ids.is_cuda:
            self.next += 1
            cache.filled += 1
        return model.lm_head(h)

    def through_blocks(self, model: Falcon, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """ids (rows,) -> the residual before the last block's sum, and what that sum adds: (rows, hidden_size) each."""
        x, added = F.embedding(ids, model.transformer.word_embeddings.weight), []
        for block in self.blocks:
            x, added = block(x, added, self)
        return x, added

    def attend(self, attention: nn.Module, qkv: Tensor) -> Tensor:
        """The new tokens' keys and values into the cache, and each token's weighted mean: (rows, hidden_size).

        Without a context this is a step on a GPU. A prompt has falcon.py's, and so has everything on a CPU.
        """
        if self.context is None:
            from minqlora.kernels.decode_attention import decode_attention

            keys, values = self.cache.keys[attention.layer], self.cache.values[attention.layer]
            return decode_attention(qkv, keys, values, self.positions, self.cache.filled, self.rotary, self.bias)
        return attention.mix(qkv.unflatten(0, (self.batch, -1)), self.context).flatten(0, 1)

    @contextlib.contextmanager
    def beside(self, number: int) -> Iterator[None]:
        """What is launched inside runs after all launched so far on this stream, beside what is launched after it, until `join`."""
        if not self.streams:
            yield
        else:
            self.streams[number].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.streams[number]):
                yield

    def mark(self) -> torch.cuda.Event | None:
        """What has been launched on this stream so far, for another one to wait for."""
        return torch.cuda.current_stream().record_event() if self.streams else None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    def join(self) -> None:
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)

    def record(self, model: Falcon) -> None:
        with torch.cuda.device(self.ids.device):
            # Once unrecorded, on a stream of its own as a recording is, so that what happens once (compilation, workspaces) has happened.
            # It leaves the cache one token fuller; prefill empties it.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.forward(model)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self.forward(model)
            self.graph = graph

    def step(self, model: Falcon) -> Tensor:
        """Logits behind self.ids. On a GPU they are launched, not there yet, and the next step overwrites them."""
        if self.graph is None:
            return self.forward(model)
        with torch.cuda.device(self.ids.device):
            self.graph.replay()
        return self.logits


class Fetched:
    """Ids on their way to the host."""

    def __init__(self, ids: Tensor):
        self.host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=ids.is_cuda)
        self.host.copy_(ids, non_blocking=True)
        self.event = torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.host


# The last decoder of each model. It holds the model's blocks and not the model, and goes when the model goes; where merge_lora has replaced
# them, at the next answer, or by DECODERS.pop(model, None).
DECODERS: weakref.WeakKeyDictionary[Falcon, Decoder] = weakref.WeakKeyDictionary()


def addresses(model: Falcon) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def decoder_for(model: Falcon, batch: int, length: int) -> Decoder:
    # Taken out while in use: a second answer begun meanwhile gets a decoder of its own.
    decoder = DECODERS.pop(model, None)
    if decoder is not None and decoder.last is not None:
        # The last answer left a step under way, maybe on another stream.
        torch.cuda.current_stream(decoder.ids.device).wait_event(decoder.last)
    if decoder is None or not decoder.fits(model, batch, length):
        decoder = None                                                                # its memory first
        rounded = -(-length // ROUND_LENGTH) * ROUND_LENGTH
        decoder = Decoder(model, batch, min(rounded, model.config.max_position_embeddings))
    return decoder


def decode_steps(
    model: Falcon,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos: Sequence[int],
    generator: torch.Generator | None,
    keep: bool,
) -> Iterator[Tensor]:
    """What generate_steps yields, in host memory; its arguments are checked, and the model is in eval mode. keep: the decoder stays."""
    batch, tokens = input_ids.shape
    decoder = decoder_for(model, batch, tokens + max_new_tokens)
    stop, finished = torch.tensor(eos, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)    # (eos,), (batch,): on the host
    try:
        decoder.refresh()
        logits = decoder.prefill(model, input_ids, attention_mask)
        for step in range(max_new_tokens):
            decoder.ids.copy_(sample(logits, temperature, top_p, generator))
            fetched, last = Fetched(decoder.ids), step == max_new_tokens - 1
            if not last:
                logits = decoder.step(model)
            ids = fetched.wait()                                                      # (batch,)
            if len(stop):
                # A finished row is decoded on, which no other row notices, and what it says is replaced.
                ids = torch.where(finished, stop[0], ids)
                finished = finished | torch.isin(ids, stop)
            yield ids
            if last or finished.all():
                return
    finally:
        if keep:
            if decoder.graph is not None:
                decoder.last = torch.cuda.current_stream(decoder.ids.device).record_event()
            DECODERS[model] = decoder
