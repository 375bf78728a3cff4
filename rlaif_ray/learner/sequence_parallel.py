"""Ulysses sequence parallelism (Jacobs et al. 2309.14509): a group of ranks computes one micro-batch together.

    own = sequence.split(batch, model)          # this rank's part of every row
    values = own.whole(engine(own))             # of all of the micro-batch, on every rank of the group

Each rank holds every n-th token of a row, for all layers. In attention alone ranks exchange: tokens for heads before
(each rank then has all tokens of its share of the heads), heads for tokens after. So any attention function works that
treats heads alike, packed rows with shared prompts and sliding windows among them, and activations and logits shrink by
the size of the group.

DeepSpeed has an exchange of its own (deepspeed.runtime.sequence_parallel.ulysses_sp, UlyssesSPAttentionHF), which can't
be used here: it drops masks, so that padded samples would attend to padding; it takes one batch size; it can't hand the
whole row's PackedLayout on; and it replaces transformers' attention for every model of the process, where ours has the
guard's reference computation beside it.

DeepSpeed is not told of the groups: it averages gradients over all ranks, and shards over all of them. A rank's
gradient is what its own tokens contribute to the group's loss, so the sum over all ranks is the gradient of all groups'
losses, with the same scale as without groups (RlRank._accumulate).

Letters: n ranks of a group, S rows, L tokens of a whole row, m of a rank's, M targets of the whole micro-batch.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlaif_ray.attention import PACKED
from rlaif_ray.errors import InputError

if TYPE_CHECKING:
    from rlaif_ray.learner.packing import ModelInput

PADDED = "rlaif_padded"  # name in transformers' registry of sdpa over padded rows that may be split
SPLIT = (PACKED, PADDED)  # what can compute split rows
Attention = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that compute a micro-batch together: neighbours, to be on one node where that is possible."""

    size: int
    rank: int  # within the group
    process_group: Any = None  # torch's; None for a rank by itself

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its group: sums are counted once."""
        return self.rank == 0

    def split(self, batch: ModelInput, model: Any) -> ModelInput:
        """This rank's part of the micro-batch; all of it where `model`, transformers', computes whole rows.

        Every n-th token rather than a stretch: completions stand at the ends of rows, and each rank is to have the same
        number of logits. Rows are filled up to a multiple of n, and one token further, whose position is the longest
        sample's last one: RoPE that depends on the longest position is then the same on all ranks.
        """
        if self.size == 1 or model.config._attn_implementation not in SPLIT:
            return batch
        length = batch.tokens.shape[1]
        each = -(-length // self.size) + 1

        def own(values: Tensor, fill: int) -> Tensor:
            filled = torch.nn.functional.pad(values, (0, each * self.size - length), value=fill)
            return filled[:, self.rank :: self.size].contiguous()

        owners = batch.columns % self.size
        counts = torch.bincount(owners, minlength=self.size).tolist()
        most = max(counts)
        order = torch.empty_like(owners)
        for rank, count in enumerate(counts):
            order[owners == rank] = rank * most + torch.arange(count, device=order.device)
        mine = (owners == self.rank).nonzero()[:, 0]
        return replace(
            batch,
            tokens=own(batch.tokens, 0),
            positions=own(batch.positions, int(batch.positions.max())),
            rows=batch.rows[mine],
            columns=batch.columns[mine] // self.size,
            targets=batch.targets[mine] if len(batch.targets) else batch.targets,
            part=SequencePart(self, length, order, most),
        )


ALONE = SequenceGroup(1, 0)


def sequence_group(size: int, timeout_s: float | None = None) -> SequenceGroup:
    """This rank's group, of ranks with neighbouring numbers. A collective of all ranks, even for size 1.

    `timeout_s` is the longest wait in one of the group's collectives: torch would take its own default, not that of the
    ranks' main group.
    """
    if size == 1:
        return ALONE
    own, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    found = None
    for start in range(0, world, size):  # every rank takes part in the making of every group
        ranks = list(range(start, start + size))
        made = torch.distributed.new_group(ranks, timeout=timeout)
        found = made if own in ranks else found
    return SequenceGroup(size, own % size, found)


@dataclass(frozen=True, slots=True)
class SequencePart:
    """What a rank must know of the whole micro-batch that its ModelInput is a part of."""

    group: SequenceGroup
    length: int  # L
    order: Tensor  # (M,) where each target's value stands among those of all ranks, each filled up to `most`
    most: int  # targets of the rank with most of them

    def whole(self, values: Tensor) -> Tensor:
        """(M,) values of all targets, on every rank, out of this rank's. Gradients go to where they were computed."""
        filled = torch.nn.functional.pad(values, (0, self.most - len(values)))
        gathered: Tensor = _Gather.apply(filled, self.group)
        return gathered.flatten()[self.order]

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(S, heads, m, d) each -> (S, heads / n, L, d): all tokens of this rank's share of the heads.

        Fewer key-value heads than ranks are repeated, so that each rank has the one that its queries read.

        Raises:
            InputError: the heads can't be divided.
        """
        n = self.group.size
        shared = [self._divisible(tensor) for tensor in tensors]
        # (S, n, heads / n, m, d) -> (n, S, heads / n, m, d): one exchange for all of them
        sent = [tensor.unflatten(1, (n, tensor.shape[1] // n)).movedim(1, 0) for tensor in shared]
        received = _exchange([tensor.flatten(1) for tensor in sent], self.group)
        # (n, S, heads / n, m, d), the first the rank that had the tokens -> (S, heads / n, m, n, d): the row's order
        return tuple(
            flat.view(tensor.shape).movedim(0, 3).flatten(2, 3)[:, :, : self.length].contiguous()
            for flat, tensor in zip(received, sent, strict=True)
        )

    def to_tokens(self, context: Tensor) -> Tensor:
        """(S, L, heads / n, d) -> (S, m, heads, d): this rank's tokens, all heads. Tokens that fill up get zeros."""
        n = self.group.size
        each = -(-self.length // n) + 1
        filled = torch.nn.functional.pad(context, (0, 0, 0, 0, 0, each * n - self.length))
        sent = filled.unflatten(1, (each, n)).movedim(2, 0)  # (n, S, m, heads / n, d)
        (flat,) = _exchange([sent.flatten(1)], self.group)
        return flat.view(sent.shape).movedim(0, 2).flatten(2, 3).contiguous()

    def _divisible(self, tensor: Tensor) -> Tensor:
        heads, n = tensor.shape[1], self.group.size
        if heads % n == 0:
            return tensor
        if n % heads == 0:
            return tensor.repeat_interleave(n // heads, 1)
        raise InputError(f"{heads} heads can't be divided among learner.sequence_parallel={n} ranks")


def _exchange(parts: list[Tensor], group: SequenceGroup) -> list[Tensor]:
    """(n, elements) each: row k goes to rank k; row k of what comes back is from rank k."""
    widths = [part.shape[1] for part in parts]
    received: Tensor = _AllToAll.apply(torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous(), group)
    return list(received.split(widths, 1))


class _AllToAll(torch.autograd.Function):
    """Its own inverse, and so its own gradient. torch.distributed.nn has the same, and calls it deprecated."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(sent, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient.contiguous(), ctx.group), None


def _all_to_all(sent: Tensor, group: SequenceGroup) -> Tensor:
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group.process_group)
    return received


class _Gather(torch.autograd.Function):
    """Values of all ranks, on all of them. Backward takes this rank's part and adds nothing up: all ranks compute one
    and the same loss, so that every one of them already has all of its gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: SequenceGroup) -> Tensor:
        ctx.rank = group.rank
        found = own.new_empty((group.size, len(own)))
        torch.distributed.all_gather(list(found.unbind()), own.contiguous(), group=group.process_group)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.rank], None


def across_ranks(attention: Attention) -> Attention:
    """The attention function of transformers' interface, for whole rows and for rows that are split over ranks."""

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        sequence_part: SequencePart | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, Any]:
        if sequence_part is None:
            return attention(module, query, key, value, attention_mask, **arguments)
        heads = sequence_part.to_heads(query, key, value)
        context, weights = attention(module, *heads, attention_mask, **arguments)
        return sequence_part.to_tokens(context), weights

    return attend


def padded_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Any]:
    """transformers' sdpa, whatever share of the heads it is given: a module knows how many it has in all."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    shown: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # no num_key_value_groups
    found: tuple[Tensor, Any] = sdpa_attention_forward(shown, query, key, value, attention_mask, **arguments)
    return found


def whole_mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **arguments: Any) -> Any:
    """sdpa's mask for whole rows, as attention computes them, where a model has a part of each.

    `attention_mask`, (S, L), is never split.
    """
    from transformers.masking_utils import sdpa_mask

    if attention_mask is not None:
        q_length = kv_length = attention_mask.shape[-1]
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **arguments)
