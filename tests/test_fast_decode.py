"""The decoder for a GPU against generate.py and falcon.py. On a CPU its steps run unrecorded; recordings are tested on a GPU."""

import collections
import copy
import gc
import json
import re
import types
import weakref
from pathlib import Path

import pytest
import torch

from minqlora import fast_decode
from minqlora.falcon import Falcon, FalconConfig
from minqlora.fast_decode import DECODERS, Decoder, decode_steps
from minqlora.generate import generate, generate_steps
from minqlora.lora import adapters
from minqlora.qlora import add_lora, merge_lora, quantize_linears

SMALL = dict(vocab_size=61, hidden_size=96, num_hidden_layers=3, num_attention_heads=6, initializer_range=0.15, max_position_embeddings=600)
VARIANTS = {
    "7b": FalconConfig(**SMALL),
    "40b": FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True),
    "11B": FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, tie_word_embeddings=False),
    "rw-1b": FalconConfig(**SMALL, multi_query=False, parallel_attn=False, alibi=True, bias=True),
}
TARGETS = [None, "all", ["query_key_value"], ["dense_h_to_4h", "dense"]]
TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny_falcon"
FINANCE = TINY.parent / "data" / "finance.jsonl"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
    DECODERS.clear()


def small(variant="7b", targets="all", quantize=True, device="cpu"):
    torch.manual_seed(0)
    model = Falcon(VARIANTS[variant])
    if quantize:
        quantize_linears(model)
    if targets:
        add_lora(model, rank=5, alpha=15, targets=targets)
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(std=0.1)
    return model.to(device).eval()


def prompts(lengths, device="cpu"):
    """Each alone, and all together padded on the left."""
    generator = torch.Generator().manual_seed(1)
    alone = [torch.randint(61, (1, length), generator=generator) for length in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0), value=7) for prompt in alone])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return [prompt.to(device) for prompt in alone], ids.to(device), mask.to(device)


def decoded(model, ids, mask=None, new=12, temperature=0.0, top_p=1.0, eos=(), generator=None, keep=False):
    return torch.stack(list(decode_steps(model, ids, mask, new, temperature, top_p, eos, generator, keep)), dim=1)


def greedy(model, ids, answer):
    """The greedy choice behind the prompt and behind each token of the answer, of the whole text in one pass and without a cache.

    If it is the answer itself, then by induction the answer is what greedy decoding gives.
    """
    return logits_behind(model, ids, answer).argmax(-1)


def logits_behind(model, ids, answer):
    return model(torch.cat([ids, answer.to(ids.device)], dim=1))[:, ids.shape[1] - 1 : -1].cpu()


def is_greedy(model, ids, answer):
    """The same up to rounding: a tie that float32 cannot see may go either way."""
    logits = logits_behind(model, ids, answer)
    chosen = logits.gather(-1, answer[..., None])[..., 0]
    return bool((logits.amax(-1) - chosen <= 4 * TOLERANCE * logits.abs().max()).all())


def logits_of_steps(model, ids, mask, following, kind=Decoder):
    """What the decoder says behind the prompts and behind each column of `following`: (batch, 1 + columns, vocab_size)."""
    decoder = kind(model, len(ids), ids.shape[1] + following.shape[1])
    decoder.refresh()
    logits = [decoder.prefill(model, ids, mask).clone()]
    for column in following.unbind(1):
        decoder.ids.copy_(column)
        logits.append(decoder.step(model).clone())
    return torch.stack(logits, dim=1)


def logits_of_whole(model, ids, mask, following):
    new = following.shape[1]
    return model(torch.cat([ids, following], 1), torch.cat([mask, mask.new_ones(following.shape)], 1))[:, -1 - new :]


# Products of at most 384 + 5 terms in float32, in another order, through 3 layers: sqrt(389) * 6 roundings of 6e-8 of the largest value.
TOLERANCE = 389**0.5 * 6 * 6e-8


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_gives_the_logits_of_the_whole_text(variant, targets):
    model = small(variant, targets)
    _, ids, mask = prompts([9, 3, 20])
    following = torch.randint(61, (3, 4))
    expected = logits_of_whole(model, ids, mask, following)
    actual = logits_of_steps(model, ids, mask, following)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def with_kernels():
    """fast_decode.py with the kernels that stand between its products, in Triton's interpreter; products and attention are PyTorch's."""
    changed = types.ModuleType("fast_decode_with_kernels")
    source, places = re.subn(r"\b(x|u|pairs\[0\]\[0\])\.is_cuda", "True", Path(fast_decode.__file__).read_text(encoding="utf-8"))
    assert places == 4
    exec(compile(source, fast_decode.__file__, "exec"), changed.__dict__)
    return changed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU, which takes this half anyway")
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("variant", ["7b", "40b", "rw-1b"])
def test_what_a_gpu_computes_between_the_products_gives_the_logits_too(variant, targets):
    """A prompt has more rows than INNER_ROWS, a step of two prompts has fewer."""
    model = small(variant, targets)
    _, ids, mask = prompts([9, 3])
    following = torch.randint(61, (2, 2))
    expected = logits_of_whole(model, ids, mask, following)
    actual = logits_of_steps(model, ids, mask, following, with_kernels().Decoder)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("targets", [None, "all"], ids=str)
def test_a_model_in_16_or_32_bits_decodes_too(targets):
    model = small(targets=targets, quantize=False)
    _, ids, mask = prompts([9, 3])
    following = torch.randint(61, (2, 3))
    expected = logits_of_whole(model, ids, mask, following)
    actual = logits_of_steps(model, ids, mask, following)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_gives_each_prompt_what_generate_gives_it_alone(variant):
    model = small(variant)
    alone, ids, mask = prompts([9, 3, 40, 1])
    together = decoded(model, ids, mask)
    for row, prompt in enumerate(alone):
        assert together[row].tolist() == generate(model, prompt, max_new_tokens=12)[0, -12:].tolist()


def test_greedy_is_told_from_what_is_not():
    model = small()
    _, ids, _ = prompts([9])
    answer = decoded(model, ids)
    assert is_greedy(model, ids, answer) and torch.equal(answer, greedy(model, ids, answer))
    answer[0, 7] = (answer[0, 7] + 1) % 61
    assert not is_greedy(model, ids, answer)


def test_finished_rows_are_filled_with_eos_and_the_last_one_ends_it():
    model = small()
    _, ids, mask = prompts([9, 3, 4])
    answers = decoded(model, ids, mask, new=20)
    eos = [answers[0, 2].item(), answers[1, 5].item()]
    expected = generate(model, ids, mask, max_new_tokens=20, eos_token_id=eos)[:, ids.shape[1] :]
    assert torch.equal(decoded(model, ids, mask, new=20, eos=eos), expected)
    alone = decoded(model, ids[:1], mask[:1], new=20, eos=eos[:1])
    assert alone.shape[1] <= 3 and alone[0, -1] == eos[0]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_same_generator_draws_what_generate_draws_and_is_left_as_generate_leaves_it(top_p):
    model = small()
    _, ids, mask = prompts([6, 2])
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    eos = decoded(model, ids[:1], None, 8, 0.9, top_p, (), torch.Generator().manual_seed(3))[0, 4].item()
    expected = generate(model, ids, mask, 15, 0.9, top_p, eos, theirs)[:, 6:]
    assert torch.equal(decoded(model, ids, mask, 15, 0.9, top_p, [eos], ours), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_the_draws_are_those_of_multinomial():
    from minqlora.generate import draw

    weights = torch.rand(500, 30)
    expected = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(weights, torch.Generator().manual_seed(5)), expected)
    weights[:, 1:] = 0    # what was cut off is never drawn
    assert (draw(weights, None) == 0).all()


def test_a_kept_decoder_serves_the_next_call_and_sees_what_was_trained_meanwhile():
    model = small()
    _, ids, _ = prompts([9])
    first = decoded(model, ids, keep=True)
    decoder = DECODERS[model]
    assert torch.equal(decoded(model, ids[:, :5], keep=True), decoded(small(), ids[:, :5]))
    assert DECODERS[model] is decoder
    for adapter in adapters(model).values():
        adapter.lora_A.mul_(-3)
        adapter.alpha = 7
    changed = decoded(model, ids, keep=True)
    assert DECODERS[model] is decoder
    assert torch.equal(changed, generate(model, ids, max_new_tokens=12)[:, 9:]) and not torch.equal(changed, first)


def test_a_kept_decoder_is_made_anew_for_other_modules_more_rows_or_more_tokens():
    model = small()
    _, ids, mask = prompts([9, 3])
    seen = []
    for make in (lambda: decoded(model, ids[:1], keep=True), lambda: decoded(model, ids, mask, keep=True),
                 lambda: decoded(model, ids, mask, new=300, keep=True)):  # fmt: skip
        make()
        seen.append(DECODERS[model])
    merge_lora(model, torch.float32)
    assert torch.equal(decoded(model, ids, mask, keep=True), generate(model, ids, mask, max_new_tokens=12)[:, 9:])
    seen.append(DECODERS[model])
    assert len({id(decoder) for decoder in seen}) == 4
    # Rounded up for the next call to fit, but never beyond the model's positions.
    assert [decoder.length for decoder in seen] == [256, 256, 512, 256]
    assert Decoder(model, 1, 600).length == 600


def test_a_decoder_goes_when_its_model_goes_and_is_not_kept_for_one_in_training():
    model = small()
    _, ids, _ = prompts([9])
    decoded(model, ids, keep=False)
    assert model not in DECODERS
    decoded(model, ids, keep=True)
    gone = weakref.ref(DECODERS[model])
    del model
    gc.collect()
    assert gone() is None


def test_two_answers_at_a_time_do_not_disturb_each_other():
    model = small()
    (one, other), _, _ = prompts([9, 4])
    decoded(model, one, keep=True)    # a decoder is there, and only one of the two may have it
    first = decode_steps(model, one, None, 8, 0.0, 1.0, (), None, keep=True)
    start = [next(first) for _ in range(3)]
    assert torch.equal(decoded(model, other, new=8, keep=True), generate(model, other, max_new_tokens=8)[:, 4:])
    assert torch.equal(torch.stack(start + list(first), 1), generate(model, one, max_new_tokens=8)[:, 9:])


def test_an_answer_that_is_broken_off_leaves_the_decoder_as_new():
    model = small()
    _, ids, _ = prompts([9])
    expected = decoded(model, ids, keep=True)
    steps = decode_steps(model, ids, None, 12, 0.0, 1.0, (), None, keep=True)
    next(steps), next(steps)
    steps.close()
    assert torch.equal(decoded(model, ids, keep=True), expected)


def test_a_yielded_token_is_one_step_behind_what_was_launched():
    """So the device has work while the token is looked at, and exactly one step is too many at the end."""
    model, steps = small(), collections.Counter()
    _, ids, _ = prompts([9])

    class Counting(Decoder):
        def step(self, model):
            steps["launched"] += 1
            return super().step(model)

    DECODERS[model] = Counting(model, 1, 40)
    behind = [steps["launched"] for _ in decode_steps(model, ids, None, 5, 0.0, 1.0, (), None, keep=False)]
    assert behind == [1, 2, 3, 4, 4]


def test_the_cache_of_7b_holds_8_kilobytes_a_token_and_8192_tokens_67_megabytes():
    with torch.device("meta"):
        model = Falcon(FalconConfig(65024, 4544, 32, 71)).bfloat16()
        cache = model.new_cache(1, 8192)
    assert cache.keys.nbytes + cache.values.nbytes == 8192 * 8192 == 67_108_864


def held_out_questions():
    from minqlora.load import load_tokenizer

    tokenizer = load_tokenizer(TINY)
    records = map(json.loads, FINANCE.read_text(encoding="utf-8").splitlines())
    questions = [record["instruction"] for record in records if record["split"] != "train"]
    return [torch.tensor([tokenizer.encode(question).ids]) for question in questions]


def test_the_tiny_base_answers_as_the_plain_path_does():
    from minqlora.load import load_falcon

    model = load_falcon(TINY, dtype=torch.float32).eval()
    for ids in held_out_questions()[:2]:
        answer = decoded(model, ids, new=16)
        assert torch.equal(answer, greedy(model, ids, answer))


# --- on a GPU -------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_steps_give_the_logits_of_the_whole_text(variant, targets):
    model = small(variant, targets, device="cuda")
    _, ids, mask = prompts([9, 3, 300], "cuda")
    following = torch.randint(61, (3, 40), device="cuda")
    expected = logits_of_whole(model, ids, mask, following)
    actual = logits_of_steps(model, ids, mask, following)
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * TOLERANCE * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bfloat16_recorded_steps_are_as_close_to_float32_as_the_plain_path(variant):
    """Both in bfloat16 beside the same weights in float32; the recorded one may be off by no more than 1.5 times the plain one."""
    exact = small(variant, device="cuda")
    _, ids, mask = prompts([40, 30, 300], "cuda")
    following = torch.randint(61, (3, 40), device="cuda")
    expected = logits_of_whole(exact, ids, mask, following)
    model = copy.deepcopy(exact).bfloat16()
    for name, adapter in adapters(model).items():
        other = adapters(exact)[name]
        adapter.lora_A.data, adapter.lora_B.data = other.lora_A.data.clone(), other.lora_B.data.clone()
    plain = (logits_of_whole(model, ids, mask, following).float() - expected).norm()
    assert (logits_of_steps(model, ids, mask, following).float() - expected).norm() <= 1.5 * plain


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 70])
def test_generate_on_a_gpu_is_greedy_over_the_whole_text(batch):
    model = small(device="cuda")
    ids = torch.randint(61, (batch, 20), device="cuda")
    for _ in range(2):    # recorded, then replayed
        assert is_greedy(model, ids, generate(model, ids, max_new_tokens=30)[:, 20:].cpu())
    assert model in DECODERS
    DECODERS.pop(model)
    with torch.inference_mode():
        inferred = generate(model, ids, max_new_tokens=30)
    assert torch.equal(generate(model, ids, max_new_tokens=30), inferred)
    model.train()
    generate(model, ids, max_new_tokens=3)
    assert model not in DECODERS and all(module.training for module in model.modules())


@pytest.mark.gpu
def test_on_a_gpu_the_tiny_base_answers_every_held_out_question_as_the_plain_path_does():
    from minqlora.load import load_falcon

    model = load_falcon(TINY, device="cuda", dtype=torch.float32).eval()
    for ids in held_out_questions():
        ids = ids.cuda()
        answer = generate(model, ids, max_new_tokens=24)[:, ids.shape[1] :].cpu()
        assert torch.equal(answer, greedy(model, ids, answer))


@pytest.mark.gpu
@pytest.mark.parametrize("how", [(0.0, 1.0), (0.7, 0.9)], ids=str)
def test_nothing_in_a_step_waits_for_the_gpu(how):
    model = small(device="cuda")
    ids = torch.randint(61, (2, 20), device="cuda")
    generate(model, ids, max_new_tokens=4, temperature=how[0], top_p=how[1])
    steps = generate_steps(model, ids, None, 50, *how, eos_token_id=60)
    next(steps)
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert all(not step.is_cuda for step in steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_the_same_seed_draws_the_same_and_two_answers_do_not_disturb_each_other():
    model = small(device="cuda")
    (one, other), _, _ = prompts([9, 4], "cuda")

    def draw():
        generator = torch.Generator("cuda").manual_seed(3)
        return generate(model, one, None, 20, 0.9, 0.9, generator=generator).tolist()

    assert draw() == draw()
    first, second = generate_steps(model, one, max_new_tokens=12), generate_steps(model, other, max_new_tokens=12)
    answers = [torch.stack(column, 1) for column in zip(*zip(first, second, strict=True), strict=True)]
    assert is_greedy(model, one, answers[0]) and is_greedy(model, other, answers[1])
