"""15. The loss for training on a GPU: without all the logits, and without waiting for the host.

Two faster versions of train.py's `answer_loss`, each equal to it.

**The logits are the largest tensor of a step**: 65024 values a token, 2.1 GB in float32 at 8192 tokens, and the loss wants one number of
each row. `fused_loss` makes them for `chunk` tokens at a time and takes the gradient at once, while they are there: softmax - one-hot
overwrites the logits, and one product turns it into the gradient of the hidden states. Nothing of it is kept.

**At 512 tokens a step the GPU waits for Python.** A step of Falcon-7B launches thousands of kernels, which take 54 ms on an H100; launching
them takes Python several times as long. `GraphedLoss` records the forward and the backward of a batch's shape once, as a CUDA graph, and
replays it: one launch. A replay computes loss and gradients together, and `loss.backward()` hands the gradients over, so the training loop
does not change. Rows are padded to a multiple of 64 tokens, so that a few recordings serve all batches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minqlora.falcon import Falcon
from minqlora.fast import FusedBlock

IGNORED = -100    # a label that is not in the loss, as in torch's cross_entropy
CHUNK = 2048      # tokens whose logits are there at a time


def cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    """losses (M,) become the cross-entropies of logits (M, vocab) and labels (M,), and logits the gradient of their sum. 0 if ignored."""
    if logits.is_cuda:
        from minqlora.kernels.cross_entropy import cross_entropy_ as kernel

        return kernel(logits, labels, losses, IGNORED)
    wide = logits.float()
    total = wide.logsumexp(dim=1, keepdim=True)                                   # (M, 1)
    is_label = torch.arange(logits.shape[1]) == labels[:, None]
    losses.copy_(torch.where(is_label, total - wide, 0.0).sum(dim=1))
    logits.copy_(torch.where(labels[:, None] != IGNORED, (wide - total).exp() - is_label.float(), 0.0))


class ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies from hidden states (M, hidden_size) and labels (M,), with the logits of `chunk` tokens at a time."""

    @staticmethod
    def forward(ctx, hidden, head, labels, chunk):
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None      # not in an evaluation
        for start in range(0, len(hidden), chunk):
            some = slice(start, start + chunk)
            logits = hidden[some] @ head.T                                        # (chunk, vocab)
            cross_entropy_(logits, labels[some], losses[some])
            if grad is not None:
                torch.mm(logits, head, out=grad[some])
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        scaled = torch.empty_like(grad)
        for some, out in zip(grad.split(1024), scaled.split(1024), strict=True):
            out.copy_(some.float() * grad_loss)                                   # 16 bits would round one over the number of tokens
        return scaled, None, None, None


def fused_loss(model: Falcon, batch, chunk: int = CHUNK) -> Tensor:
    """The sum over the learned tokens of their cross-entropies, in float32: (). batch is data.py's."""
    hidden = model.hidden_states(batch.input_ids, batch.attention_mask).flatten(0, 1)      # (batch * tokens, hidden_size)
    before = hidden.index_select(0, batch.learned - 1)                                     # (learned, hidden_size)
    return ChunkedLoss.apply(before, model.lm_head.weight, batch.labels.flatten()[batch.learned], chunk)


class GraphedLoss:
    """fused_loss for a model in training on a GPU, replayed from a recording a shape. Batches above `most_tokens` are computed as usual.

    Where a batch is that large the GPU is busy long enough for the host to keep ahead, and a recording would only hold on to memory.
    `blocks` is what `fuse(model)` returned. Each recording keeps alpha and dropout as they were: do not change them afterwards. All losses
    leave their gradients in one place: RuntimeError from the backward of one that is not the last, or that was walked back before.
    """

    def __init__(self, model: Falcon, blocks: list[FusedBlock], most_tokens: int = 4096):
        self.model, self.blocks, self.most_tokens = model, blocks, most_tokens
        self.parameters = [matrix for block in blocks for matrix in block.adapters]
        # All recordings write here, and backward makes it the parameters' own: a gradient is in memory once, with a recording or without.
        self.gradients = []                                                       # made with the first recording
        self.recordings, self.pool = {}, None
        self.turn = 0                                                             # which loss the gradients belong to
        # Autograd asks for one input that wants a gradient. It must not be the parameters: autograd remembers the stream on which a
        # parameter first got a gradient, and a backward waits for it. In a recording, to wait for a stream outside of it is an error.
        self.anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)

    def __call__(self, model: Falcon, batch) -> Tensor:
        rows, tokens = batch.input_ids.shape
        padded = -(-tokens // 64) * 64
        fits = rows * padded <= self.most_tokens and padded <= model.config.max_position_embeddings
        if not (torch.is_grad_enabled() and model.training and fits) or batch.attention_mask is not None:
            return fused_loss(model, batch)
        # Any token may stand for padding on the right: no other looks there, and it has no label.
        ids = F.pad(batch.input_ids, (0, padded - tokens))
        # The label of a token is the one to its right; the last of a row has none.
        labels = F.pad(batch.labels[:, 1:], (0, padded - tokens + 1), value=IGNORED)
        return Replay.apply(self.anchor, self, ids, labels)

    def replay(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.gradients = self.gradients or [torch.zeros_like(parameter) for parameter in self.parameters]
        # Where a step has several batches, what the last one left is still wanted, and a recording overwrites it as a replay does.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is gradient:
                parameter.grad = gradient.clone()
        if ids.shape not in self.recordings:
            with torch.cuda.device_of(ids):                                       # streams and recordings go to the current device
                self.recordings[ids.shape] = self.record(ids, labels)
        self.turn += 1
        # A graph reads and writes the same addresses each time: a batch is copied in, the loss out.
        graph, static_ids, static_labels, loss = self.recordings[ids.shape]
        static_ids.copy_(ids)
        static_labels.copy_(labels)
        with torch.cuda.device_of(ids):
            graph.replay()
        return loss.clone()

    def record(self, ids: Tensor, labels: Tensor):
        ids, labels = ids.clone(), labels.clone()
        # Stand-ins with the adapters' memory and no history, for the reason of the anchor.
        leaves = iter([parameter.detach().requires_grad_() for parameter in self.parameters])
        own = [block.adapters for block in self.blocks]
        for block in self.blocks:
            block.adapters = [next(leaves) for _ in block.adapters]
        stand_ins = [matrix for block in self.blocks for matrix in block.adapters]

        def step() -> Tensor:
            with torch.enable_grad():
                hidden = self.model.hidden_states(ids).flatten(0, 1)
                # Of all tokens, ignored ones too: how many are learned changes from batch to batch, and a recording has one shape.
                loss = ChunkedLoss.apply(hidden, self.model.lm_head.weight, labels.flatten(), CHUNK)
                torch._foreach_copy_(self.gradients, torch.autograd.grad(loss, stand_ins))
            return loss.detach()

        try:
            # Twice on a stream of its own, so that everything that happens once (compilation, workspaces) has happened.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # They must not use up random numbers: a resumed run records at other steps, and has to repeat this one's.
            with torch.cuda.stream(stream), torch.random.fork_rng([ids.device]):
                step()
                step()
            torch.cuda.current_stream().wait_stream(stream)
            # One pool for all: only one is replayed at a time, so what they hold in between may be the same memory.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                loss = step()
            self.pool = graph.pool()
        finally:
            # Also where recording fails: who goes on without it must not train the stand-ins.
            for block, adapters in zip(self.blocks, own, strict=True):
                block.adapters = adapters
        return graph, ids, labels, loss


class Replay(torch.autograd.Function):
    """The loss. Its backward gives the adapters the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx, anchor, graphed, ids, labels):
        loss = graphed.replay(ids, labels)
        ctx.graphed, ctx.turn = graphed, graphed.turn
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        graphed = ctx.graphed
        if ctx.turn != graphed.turn:
            raise RuntimeError("a replayed loss is walked back once, and before the next is computed: its gradients are gone")
        graphed.turn += 1
        torch._foreach_mul_(graphed.gradients, grad_loss)
        for parameter, gradient in zip(graphed.parameters, graphed.gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return None, None, None, None
