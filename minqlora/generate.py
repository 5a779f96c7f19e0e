"""11. Sampling: one token at a time, with a key/value cache.

A token attends to the keys and values of those before it, which do not change any more: they are kept in a cache. The prompt goes through
the model once and fills it; from then on each step sends one token a row and reads it. A step costs one pass over the weights,
whatever the length: at batch 1, memory bandwidth is all that counts.

    logits -> greedy                     temperature = 0: the largest
           -> softmax(logits / T)        T > 0: below 1 sharper, above 1 flatter
           -> top-p                      keep the fewest tokens whose probabilities reach p together, draw among them
                                         (the QLoRA paper samples with p = 0.9, T = 0.7)

**Batches** are padded on the left, so that the last column is the last token of every prompt. The attention mask keeps the padding
out and positions count real tokens alone, so each prompt gets what it would get alone. A row that has said eos is
finished: it is filled with eos until the last row is done.

**On a GPU** `fast_decode.py` does the same with each step recorded as a CUDA graph. Everything below stays the definition.

On a CPU any model will do that has `hidden_states(input_ids, attention_mask, cache)`, `lm_head`, `new_cache(batch, length)` and
`config.max_position_embeddings`.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prompts (batch, tokens), padded on the left -> prompts and answers (batch, tokens + at most max_new_tokens).

    attention_mask (batch, tokens) is 0 on padding. eos_token_id ends an answer: of several any does; None: nothing but the length.
    generator makes the draws; None: PyTorch's own. ValueError for what makes no sense, or exceeds the model's positions.
    """
    steps = generate_steps(model, input_ids, attention_mask, max_new_tokens, temperature, top_p, eos_token_id, generator)
    return torch.cat([input_ids, torch.stack(list(steps), dim=1).to(input_ids)], dim=1)


# Gradients are off while a step runs and as they were at each yield: the caller's own code runs outside.
@torch.no_grad()
def generate_steps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The same, as it comes: yields the ids (batch,) of each step, eos included, and ends when every row has said eos.

    While it runs the model is in eval mode; afterwards, or when the iterator is closed, every module is as it was before. (So two answers
    of a model in training must not overlap.) From a GPU the ids come in host memory: to read them is to wait for them alone, and not
    for the step that is on its way by then.
    """
    _check(model, input_ids, attention_mask, max_new_tokens, temperature, top_p)
    batch, tokens = input_ids.shape
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    stop = torch.tensor(eos, dtype=input_ids.dtype, device=input_ids.device)              # (eos,)
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)              # (batch,)
    modes = [(module, module.training) for module in model.modules()]
    # What is made in inference mode cannot be written to outside of it, so it is not kept for the next call either.
    keep = not model.training and not torch.is_inference_mode_enabled()
    model.eval()
    try:
        if input_ids.is_cuda:
            # Here, not at the top: fast_decode imports this file, and nobody on a CPU needs it.
            from minqlora.fast_decode import decode_steps

            how = (max_new_tokens, temperature, top_p, eos, generator)
            yield from decode_steps(model, input_ids, attention_mask, *how, keep=keep)
            return
        # The last token is never sent back, so its keys need no place.
        cache = model.new_cache(batch, tokens + max_new_tokens - 1)
        hidden = model.hidden_states(input_ids, attention_mask, cache)                    # (batch, tokens, hidden_size)
        for step in range(max_new_tokens):
            # The head reads the last token alone: over a long prompt the logits of all would be the largest tensor there is.
            ids = sample(model.lm_head(hidden[:, -1]), temperature, top_p, generator)     # (batch,)
            if eos:
                ids = torch.where(finished, stop[0], ids)
                finished = finished | torch.isin(ids, stop)
            yield ids
            if step == max_new_tokens - 1 or (eos and finished.all()):
                return
            hidden = model.hidden_states(ids[:, None], None, cache)                       # (batch, 1, hidden_size)
    finally:
        for module, training in modes:
            module.training = training


def sample(logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """One id for each row: logits (batch, vocab_size) -> ids (batch,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)                   # (batch, vocab_size)
    if top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True)                        # (batch, vocab_size) each
        # A token stays while those before it have not reached p: so the most likely one always does.
        before = ordered.cumsum(dim=-1) - ordered
        return ids.gather(-1, draw(ordered.masked_fill(before >= top_p, 0.0), generator)).squeeze(-1)
    return draw(probabilities, generator).squeeze(-1)


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index (batch, 1) for each row of weights (batch, n), which need not sum to 1: the first arrival among exponential waits."""
    # The very draws of torch.multinomial, which before each asks the device whether the weights are finite, and waits for the answer.
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)


def _check(model, input_ids, attention_mask, max_new_tokens, temperature, top_p) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: (batch, tokens) with at least one token is needed")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} is not of input_ids' shape {tuple(input_ids.shape)}")
        if not attention_mask[:, -1].all():
            raise ValueError("attention_mask ends in 0: prompts of different lengths are padded on the left")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
    tokens, limit = input_ids.shape[1], model.config.max_position_embeddings
    if tokens + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, the prompt has {tokens} tokens and the model {limit} positions:"
            f" at most {max(0, limit - tokens)} new tokens fit"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: 0 (greedy) or more is needed, and a finite number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: more than 0 and at most 1 is needed")
