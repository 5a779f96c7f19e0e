"""The ledger against the real thing: bytes of a quantized model, tensors that autograd keeps, and what the allocator says of a backward.

The published configurations are written out here; everything measured is a small Falcon of the same kind on the CPU. There a weight's
dequantization is replaced by an empty tensor of its size, which is what it costs on a GPU: the reference has temporaries of its own.
"""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import minqlora.activations as activations
import minqlora.fast as fast
import minqlora.fast_loss as fast_loss
import minqlora.linear4bit as linear4bit
import minqlora.optim as optim
import minqlora.plan as planning
from minqlora.activations import Flags, kept_by_block
from minqlora.data import Batch
from minqlora.falcon import Falcon, FalconConfig
from minqlora.load import load_falcon, save_falcon
from minqlora.lora import LoRALinear
from minqlora.plan import advise, parameter_count, parse_memory, plan, report
from minqlora.qlora import Linear4bit, add_lora, block_linears, count_parameters, quantize_linears
from minqlora.train import answer_loss

PUBLISHED = {
    "rw-1b": FalconConfig(50304, 2048, 24, 32, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "7b": FalconConfig(65024, 4544, 32, 71),
    "40b": FalconConfig(65024, 8192, 60, 128, 8, new_decoder_architecture=True),
    "180B": FalconConfig(65024, 14848, 80, 232, 8, new_decoder_architecture=True),
    "11B": FalconConfig(65024, 4096, 60, 32, 8, 16384, 8192, new_decoder_architecture=True, num_ln_in_parallel_attn=1,
                        tie_word_embeddings=False),
}  # fmt: skip
# The same kinds in small. 40 is no multiple of 64, and no count of blocks here is one of 256.
SMALL = {
    "rw-1b": FalconConfig(96, 64, 2, 8, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "7b": FalconConfig(96, 64, 2, 8),
    "40b": FalconConfig(96, 64, 2, 8, 2, new_decoder_architecture=True),
    "11B": FalconConfig(96, 64, 2, 8, 2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, tie_word_embeddings=False),
    "ragged": FalconConfig(50, 40, 3, 5, ffn_hidden_size=72),
}
KINDS = ["rw-1b", "7b", "40b", "11B"]
# What does not grow with the tokens: the buffers of CPU attention, of a fixed size for each thread, gradients of adapters of rank 4,
# and on processors that multiply bfloat16 the packed copies that oneDNN's products make.
SCRATCH = 96 * 1024


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dequantized_for_nothing(monkeypatch):
    monkeypatch.setattr(linear4bit, "dequantize", lambda *stored: torch.empty(stored[-3], dtype=stored[-1]))


def falcon(config, flags):
    model = Falcon(config).to(flags.dtype)
    if flags.quantize:
        quantize_linears(model, blocksize=flags.blocksize, double_quant=flags.double_quant)
    targets = "all" if flags.targets == "all" else list(flags.targets)
    return add_lora(model, flags.rank, dropout=flags.dropout, targets=targets, dtype=flags.adapter_dtype).train()


def peak_of(function) -> tuple[int, int]:
    """What a call leaves allocated, and the most that it had allocated at a time, as the CPU's allocator reports them."""
    # What an earlier call left behind would be counted as freed in this one.
    gc.collect()
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    gc.enable()
    events = sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    assert events, "the profiler recorded no allocation"
    return now, most


# What stays -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "tied", "untied", "four_bit"), [
    ("rw-1b", "1.312", "1.415", "0.62"), ("7b", "6.922", "7.217", "3.42"), ("40b", "41.303", "41.836", "21.0"),
    ("180B", "178.56", "179.52", "91.6"), ("11B", "10.84", "11.103", "5.45"),
])  # fmt: skip
def test_published_models_have_their_published_size(name, tied, untied, four_bit):
    def rounded_as(text, value):
        return f"{value / 1e9:.{len(text.partition('.')[2])}f}" == text

    config = PUBLISHED[name]
    assert rounded_as(tied, parameter_count(replace(config, tie_word_embeddings=True)))
    assert rounded_as(untied, parameter_count(replace(config, tie_word_embeddings=False)))
    parts = plan(config, Flags()).resident
    assert rounded_as(four_bit, parts["weights in 4 bits"] + parts["absmax"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_our_own_class(name):
    config = PUBLISHED[name]
    with torch.device("meta"):
        model = Falcon(config)
        total = count_parameters(model)[1]
        trained = count_parameters(add_lora(model, rank=64))[0]
    assert parameter_count(config) == total
    assert sum(planning.adapter_numels(config, Flags())) == trained


def bytes_by_part(model) -> dict[str, int]:
    parts = dict.fromkeys(("weights in 4 bits", "absmax", "embeddings", "norms, biases", "adapters"), 0)
    packed = {}
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            packed |= {id(p): "absmax" for name, p in layer.named_parameters() if "absmax" in name or "offset" in name}
            packed[id(layer.weight)] = "weights in 4 bits"
    for name, p in model.named_parameters():                               # a tied head once
        if id(p) in packed:
            part = packed[id(p)]
        elif "lora_" in name:
            part = "adapters"
        else:
            part = "embeddings" if "word_embeddings" in name or "lm_head" in name else "norms, biases"
        parts[part] += p.nbytes
    return parts


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("flags", [
    Flags(rank=4), Flags(rank=3, double_quant=False, dtype=torch.float32), Flags(rank=4, blocksize=128, targets=("dense", "up")),
    Flags(rank=5, targets=("query_key_value",), adapter_dtype=torch.bfloat16, optimizer="paged"),
])  # fmt: skip
def test_the_bytes_of_every_part_are_those_of_a_real_model(name, flags):
    if "up" in flags.targets:
        flags = replace(flags, targets=("dense", "dense_h_to_4h"))
    model, config = falcon(SMALL[name], flags), SMALL[name]
    expected = {part: size for part, size in plan(config, flags).resident.items() if part != "optimizer states"}
    assert bytes_by_part(model) == expected


def test_config_json_alone_foretells_a_loaded_checkpoint(tmp_path):
    config = SMALL["ragged"]
    save_falcon(Falcon(config), tmp_path)
    model = add_lora(load_falcon(tmp_path, dtype=torch.float32), rank=4)
    expected = plan(FalconConfig.from_json(config.to_json()), Flags(rank=4, dtype=torch.float32)).resident
    assert bytes_by_part(model) == {part: size for part, size in expected.items() if part != "optimizer states"}


def test_falcon_7b_ends_in_ragged_groups():
    # query_key_value: 4672 x 4544 weights are 331 712 blocks, 1295.75 groups; so 1296 floats. One more is the offset.
    assert planning.absmax_bytes(4672 * 4544, 64, True) == 331712 + 4 * 1296 + 4
    assert planning.absmax_bytes(4672 * 4544, 64, False) == 4 * 331712
    assert planning.packed_bytes(3) == 2


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizer_states_have_the_planned_bytes(name, monkeypatch):
    numels = [64 * 80, 64 * 61, 4096, 4095, 5000, 64 * 100]
    params = [nn.Parameter(torch.randn(n)) for n in numels]
    optimizer = optim.make_optimizer(params, name)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    if name == "paged":
        # On a GPU each of two windows has room for the largest page; on a CPU the pages are the same, and there are no windows.
        for page in (6000, 11000, 2**22):
            monkeypatch.setattr(activations, "BUCKET", page)
            pages = optim.PagedAdamW(params, page=page).pages
            assert planning.optimizer_bytes(numels, name) == 2 * max(host.nbytes for _, _, host in pages)
    else:
        held = sum(x.nbytes for state in optimizer.state.values() for key, x in state.items() if key != "step")
        assert planning.optimizer_bytes(numels, name) == held


def test_numbers_that_plan_repeats_are_those_of_their_modules():
    assert (activations.OPTIMIZERS, activations.BUCKET, activations.BLOCKSIZE_8BIT) == (optim.OPTIMIZERS, optim.GPU_BUCKET, optim.BLOCKSIZE)
    assert optim.AdamW8bit([nn.Parameter(torch.zeros(1))]).defaults["min_8bit_size"] == activations.MIN_8BIT_SIZE
    assert fast_loss.fused_loss.__defaults__[0] == activations.CHUNK
    assert planning.NESTED_BLOCKSIZE == linear4bit.NESTED_BLOCKSIZE


# What comes and goes --------------------------------------------------------------------------------------------------------------------

def entry_of_block(model, flags):
    """An input for a block, and what a call shares among the blocks."""
    x = torch.randn(flags.batch_size, flags.length, model.config.hidden_size, dtype=flags.dtype, requires_grad=True)
    return x, model.context(flags.length, None, None, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["all", ("query_key_value",), ("dense_4h_to_h", "dense")])
def test_autograd_keeps_the_planned_tensors_to_the_byte(kind, dtype, dropout, targets):
    flags = Flags(batch_size=2, length=32, rank=4, targets=targets, dropout=dropout, dtype=dtype, device="cpu")
    model = falcon(SMALL[kind], flags)
    x, context = entry_of_block(model, flags)
    # Not the block's own: parameters, its input, the angles or ALiBi's bias, the 16 levels.
    others = [*model.parameters(), x, *(context.rotary or ()), *([] if context.mask is None else [context.mask])]
    others += [level for layer in model.modules() if isinstance(layer, Linear4bit) for level in (layer.code, layer.code2)]
    others, kept = {t.untyped_storage().data_ptr() for t in others}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model.transformer.h[0](x, context)
    assert sum(size for place, size in kept.items() if place not in others) == sum(kept_by_block(SMALL[kind], flags).values())
    assert y.requires_grad
    if context.mask is not None:
        assert context.mask.nbytes == sum(activations.shared_by_blocks(SMALL[kind], flags).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("dtype", "dropout", "targets"), [
    (torch.float32, 0.0, "all"), (torch.bfloat16, 0.0, "all"), (torch.float32, 0.1, "all"), (torch.float32, 0.0, ("query_key_value",)),
    (torch.bfloat16, 0.1, ("dense_h_to_4h", "dense_4h_to_h")),
])  # fmt: skip
def test_a_blocks_backward_peaks_where_planned(kind, checkpointing, dtype, dropout, targets, dequantized_for_nothing):
    flags = Flags(batch_size=8, length=128, rank=4, targets=targets, dropout=dropout, dtype=dtype, checkpointing=checkpointing,
                  device="cpu")
    model = falcon(SMALL[kind], flags)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    x, context = entry_of_block(model, flags)
    block, grad = model.transformer.h[0], torch.ones_like(x)

    def forward_and_backward():
        y = checkpoint(block, x, context, use_reentrant=False) if checkpointing else block(x, context)
        y.backward(grad)

    _, most = peak_of(forward_and_backward)
    named, workspace = activations.block_at_work(SMALL[kind], flags, kept=False)
    # The gradient of the output was there before, and so were those of the adapters; the output is there as well.
    planned = sum(named.values()) + workspace - named.get("its adapters' gradients", 0)
    assert 0 <= most - planned <= SCRATCH, f"{most:,} measured, {planned:,} planned"


@pytest.mark.parametrize("kind", ["7b", "40b", "11B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keep", "length"), [(False, 128), (True, 128), (False, 2)])       # with two tokens a row, weights are the most
def test_a_fused_block_keeps_and_peaks_as_planned(kind, dtype, keep, length, monkeypatch):
    # The kernels of norm and GELU make no temporaries; what stands for them on the CPU makes none here either.
    monkeypatch.setattr(fast, "norm_into", lambda x, norm, out: out.fill_(1))
    monkeypatch.setattr(fast, "norm_backward", lambda x, norm, grad, onto: torch.empty_like(x))
    monkeypatch.setattr(fast, "gelu_into", lambda u, out: torch.ops.aten.gelu.out(u, out=out))
    monkeypatch.setattr(fast, "gelu_backward_", lambda u, grad, inner, A: None)
    monkeypatch.setattr(Linear4bit, "dequantize", lambda self, dtype, out: out.fill_(1))
    config = SMALL[kind]
    flags = Flags(batch_size=8, length=length, rank=4, dropout=0.0, dtype=dtype, fused=True, keep_bytes=10**9 * keep, device="cpu")
    model = falcon(config, flags)
    fast.fuse(model, flags.keep_bytes, flags.tokens)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    x, context = entry_of_block(model, flags)
    out, grad = {}, torch.ones_like(x)

    def forward():
        out["y"] = model.transformer.h[0](x, context)

    thin, products, blocks = activations.left_by_block(config, flags)
    assert blocks == (config.num_hidden_layers if keep else 1)
    left, _ = peak_of(forward)
    assert 0 <= left - (x.nbytes + thin + products * keep) <= 64           # and four seeds
    _, most = peak_of(lambda: out.pop("y").backward(grad))
    named, workspace = activations.block_at_work(config, flags, keep)
    planned = sum(named.values()) + workspace - grad.nbytes - products * keep
    # The kernel that turns gradients back has no temporaries; autograd has two, which show where `up` was let go before.
    turning = flags.rows(2 * config.hidden_size) * (config.num_ln_in_parallel_attn == 2)
    assert 0 <= most - planned <= SCRATCH + turning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_peaks_where_planned(dtype):
    config, tokens = FalconConfig(2000, 32, 1, 4), 257
    flags = Flags(batch_size=1, length=tokens - 1, rank=4, dtype=dtype, device="cpu")
    model = Falcon(config).to(dtype).requires_grad_(False)
    hidden = torch.randn(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    model.hidden_states = lambda *_: model.transformer.ln_f(hidden)
    ids, out = torch.randint(config.vocab_size, (1, tokens)), {}
    batch = Batch(ids, ids, torch.arange(1, tokens), None, tokens)

    def forward():
        out["loss"] = answer_loss(model, batch)

    left, during = peak_of(forward)
    _, most = peak_of(lambda: out.pop("loss").backward())
    planned = sum(activations.loss_at_work(config, flags).values())
    # Beside it stand a few tensors (tokens, hidden_size), and what indexes them.
    assert 0 <= max(during, left + most) - planned <= 4 * hidden.nbytes + 16 * tokens


@pytest.mark.parametrize("kind", ["7b", "40b"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_weights_are_kept_dequantized_as_planned(kind, blocks):
    config = SMALL[kind]
    flags = Flags(batch_size=8, length=16, rank=4, dropout=0.0, dtype=torch.float32, fused=True, device="cpu")
    probe = fast.fuse(falcon(config, flags))
    each = probe[0].weight_numel * 4
    products = config.num_hidden_layers * flags.tokens * probe[0].kept_width * 4
    flags = replace(flags, keep_bytes=products + blocks * each + each // 2)
    kept = [product.kept_weight for block in fast.fuse(falcon(config, flags), flags.keep_bytes, flags.tokens) for product in block.products]
    held = sum(weight.nbytes for weight in kept if weight is not None)
    assert held == blocks * each == activations.fused_weights_kept(config, flags)
    assert plan(config, flags).resident.get("weights kept dequantized", 0) == held


def test_an_8bit_update_takes_the_planned_temporaries(monkeypatch):
    numels = [2**14, 2**15, 2**14]
    params = [nn.Parameter(torch.randn(n)) for n in numels]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = optim.AdamW8bit(params)
    optimizer.step()                                                       # the tables of the maps are there from now on
    _, most = peak_of(optimizer.step)
    planned = activations.optimizer_at_work(numels, Flags(optimizer="adamw8bit"))
    assert 0 <= most - planned <= 0.01 * planned                           # and the scales, 8 bytes for 256 values


@pytest.mark.parametrize(("kind", "changes"), [
    ("7b", {}), ("40b", {"checkpointing": False}), ("rw-1b", {"dropout": 0.1}), ("11B", {"accumulate": 2}),
    ("7b", {"rank": 256, "length": 64}), ("40b", {"length": 16, "rank": 16, "batch_size": 1, "quantize": False}),
])  # fmt: skip
def test_a_whole_step_peaks_within_three_percent_of_the_plan(kind, changes, dequantized_for_nothing):
    config = replace(SMALL[kind], num_hidden_layers=4, vocab_size=128, hidden_size=128, num_attention_heads=8, ffn_hidden_size=512)
    flags = replace(Flags(batch_size=8, length=128, accumulate=1, rank=8, dropout=0.0, dtype=torch.float32, device="cpu"), **changes)
    model = falcon(config, flags)
    model.checkpointing = flags.checkpointing
    optimizer = optim.make_optimizer(model.parameters(), "adamw")
    shape = (flags.batch_size, flags.length)
    ids = torch.randint(config.vocab_size, shape)
    batch = Batch(ids, ids, torch.arange(1, flags.tokens), None, flags.tokens)

    def step():
        for _ in range(flags.accumulate):
            answer_loss(model, batch).backward()
        optimizer.zero_grad()

    ledger = plan(config, flags)
    _, most = peak_of(step)
    planned = ledger.allocated - sum(ledger.resident.values())
    assert 0.97 * planned <= most <= 1.03 * planned + SCRATCH, f"{most:,} measured, {planned:,} planned, in the {ledger.peak}"


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [
    {}, {"checkpointing": False}, {"optimizer": "adamw8bit"}, {"optimizer": "paged", "adapter_dtype": torch.bfloat16, "batch_size": 1},
    {"fused": True}, {"fused": True, "keep_bytes": 2**29},
])  # fmt: skip
def test_a_step_on_a_gpu_peaks_within_five_percent_of_the_plan(changes):
    config = FalconConfig(32000, 2048, 6, 32)
    flags = replace(Flags(batch_size=4, length=512, accumulate=1, dropout=0.0), **changes)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    outside = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        model = falcon(config, flags)
    model.checkpointing = flags.checkpointing
    if flags.fused:
        fast.fuse(model, flags.keep_bytes, flags.tokens)
    loss = fast_loss.fused_loss if flags.fused else answer_loss
    optimizer = optim.make_optimizer(model.parameters(), flags.optimizer)
    ids = torch.randint(config.vocab_size, (flags.batch_size, flags.length), device="cuda")
    batch = Batch(ids, ids, torch.arange(1, flags.tokens, device="cuda"), None, flags.tokens)
    # The first step loads kernels and allocates the optimizer's states and cuBLAS's workspace.
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured, planned = torch.cuda.max_memory_allocated() - outside, plan(config, flags).allocated
    assert abs(measured - planned) <= 0.05 * measured, f"{measured:,} measured, {planned:,} planned"


# The ledger and the verdict -------------------------------------------------------------------------------------------------------------

def test_the_parts_add_up_to_the_peak():
    for flags in (Flags(), Flags(optimizer="paged", batch_size=1), Flags(fused=True, keep_bytes=10**9), Flags(checkpointing=False)):
        ledger = plan(PUBLISHED["7b"], flags)
        assert ledger.allocated == sum(ledger.resident.values()) + max(sum(parts.values()) for parts in ledger.moments.values())
        assert ledger.total == ledger.allocated + ledger.slack + ledger.context
        rows = [line for line in report(ledger).splitlines() if line.startswith("  ") and line[24:34].strip().replace(".", "").isdigit()]
        numbers = [float(line[24:34]) for line in rows]
        where = next(i for i, line in enumerate(rows) if "allocated" in line)
        # Each row is rounded to a thousandth.
        assert abs(sum(numbers[:where]) - numbers[where]) <= 0.0005 * (where + 1)
        assert abs(sum(numbers[where:-1]) - numbers[-1]) <= 0.0005 * 4


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_recording_adds_one_batch_and_no_second_copy_of_the_gradients(accumulate):
    flags = Flags(fused=True, batch_size=1, accumulate=accumulate)
    recorded = plan(PUBLISHED["7b"], replace(flags, recorded=True))
    one = plan(PUBLISHED["7b"], replace(flags, accumulate=1))
    # float32; a second batch is added to a copy of the first one's
    gradients = 4 * sum(planning.adapter_numels(PUBLISHED["7b"], flags))
    assert recorded.moments[recorded.peak]["gradients"] == gradients * (1 if accumulate == 1 else 2)
    # adamw has no temporaries: beside the gradients there is what the fullest moment of a batch takes.
    batch = max(sum(parts.values()) for name, parts in one.moments.items() if name != "optimizer's step")
    assert recorded.allocated == sum(recorded.resident.values()) + batch + gradients * (1 if accumulate == 1 else 2)


def test_columns_are_aligned_and_units_said():
    text = report(plan(PUBLISHED["40b"], Flags()), "falcon-40b", parse_memory("24GiB"))
    rows = [line for line in text.splitlines() if line.startswith(("  weights", "  absmax", "  adapters", "  in use"))]
    assert {(line[30], line[40]) for line in rows} == {(".", ".")}
    assert "10^9" in text and "2^30" in text and max(map(len, text.splitlines())) <= 140
    # 1 GiB = 1.073741824 GB
    gb, gib = float(rows[0][24:34]), float(rows[0][34:44])
    assert abs(gb - gib * 1.073741824) < 0.002


@given(
    name=st.sampled_from(["7b", "40b", "rw-1b"]), batch=st.sampled_from([1, 2, 6, 16]), length=st.sampled_from([128, 512, 2048]),
    rank=st.sampled_from([8, 64]), optimizer=st.sampled_from(optim.OPTIMIZERS), checkpointing=st.booleans(), fused=st.booleans(),
    memory=st.integers(1, 80),
)  # fmt: skip
@example("7b", 1, 2048, 8, "adamw", False, True, 1)    # a shorter length makes it pay to give up the fused blocks, an earlier measure
@settings(max_examples=40, deadline=None)
def test_advice_fits_and_asks_for_no_more_than_it_must(name, batch, length, rank, optimizer, checkpointing, fused, memory):
    config, memory, fused = PUBLISHED[name], memory * 2**30, fused and name != "rw-1b"
    flags = Flags(batch_size=batch, length=length, rank=rank, optimizer=optimizer, checkpointing=checkpointing, fused=fused,
                  recorded=fused and length * batch <= 4096, keep_bytes=2**32 * fused)
    steps = advise(config, flags, memory)
    if plan(config, flags).total <= memory:
        assert steps == []
        return
    last = steps[-1] if steps else flags
    if plan(config, last).total > memory:
        # Nothing is left to give: each measure is used up, or would cost more.
        changes = [measure(last) for _, measure in planning.MEASURES]
        assert all(plan(config, change).total >= plan(config, last).total for change in changes if change)
        return
    assert last.batch_size * last.accumulate == batch * flags.accumulate   # as many rows a step
    for fields in ({"length": flags.length}, {"rank": flags.rank}, {"adapter_dtype": flags.adapter_dtype}, {"fused": flags.fused},
                   {"batch_size": flags.batch_size, "accumulate": flags.accumulate}, {"checkpointing": flags.checkpointing}):
        back = replace(last, **fields)
        assert back == last or plan(config, back).total > memory, f"{fields} was given up for nothing"


def test_the_verdict_says_what_to_type():
    text = report(plan(PUBLISHED["40b"], Flags()), "falcon-40b", parse_memory("26 GiB"))
    assert "Does NOT fit into 26.00 GiB" in text and "All at once: " in text
    flags = advise(PUBLISHED["40b"], Flags(), parse_memory("26 GiB"))[-1]
    assert f"--batch-size {flags.batch_size} --accumulate {flags.accumulate}" in text
    assert "No flags make it fit" in report(plan(PUBLISHED["180B"], Flags()), memory=parse_memory("24GiB"))
    text = report(plan(PUBLISHED["7b"], Flags()), memory=parse_memory("24GiB"))
    batch = int(text.rpartition("--batch-size ")[2].rstrip("."))
    fits = [plan(PUBLISHED["7b"], Flags(batch_size=b)).total <= parse_memory("24GiB") for b in (batch, batch + 1)]
    assert "Fits into 24.00 GiB" in text and fits == [True, False]


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("141 GB", 141 * 10**9), ("1.5TiB", 3 * 2**39), (" 512MiB ", 2**29)])
def test_memory_is_read_in_both_kinds_of_units(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "24gib", "GiB", "-1GB", "0GB", "1e3GB", ""])
def test_memory_without_a_clear_unit_is_refused(text):
    with pytest.raises(ValueError, match="24GiB"):
        parse_memory(text)


def test_what_cannot_run_is_refused():
    with pytest.raises(ValueError, match="4096; the model has 2048"):
        plan(PUBLISHED["7b"], Flags(length=4096))
    with pytest.raises(ValueError, match="fused blocks"):
        plan(PUBLISHED["rw-1b"], Flags(fused=True))
    with pytest.raises(ValueError, match="match no linear"):
        plan(PUBLISHED["7b"], Flags(targets=("q_proj",)))
    for wrong in ({"batch_size": 0}, {"rank": 0}, {"dropout": 1.0}, {"optimizer": "sgd"}, {"adapter_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=next(iter(wrong)).partition("_")[0]):
            Flags(**wrong)


def test_targets_are_matched_as_add_lora_matches_them():
    for targets in ("all", ("dense",), ("mlp.dense_4h_to_h",), ("self_attention.query_key_value", "dense_h_to_4h")):
        model = falcon(SMALL["7b"], Flags(rank=2, targets=targets))
        adapted = [name for name, layer in block_linears(model).items() if isinstance(layer, LoRALinear)]
        real = {name.partition("h.0.")[2] for name in adapted if "h.0." in name}
        assert real == {linear.name for linear in activations.block_linears(SMALL["7b"], targets) if linear.adapted}
