"""How groups of rows share the experts: slots per group and expert, and what an expert tells about the group.

Groups are modalities, tasks, languages or samples; `Context.modality` of a recorded routing is one numbering of them.

    I(expert; group) = sum_{m, e} p(m, e) log2( p(m, e) / (p(m) p(e)) )     in bits

with p(m, e) the share of all counted slots that rows of group m gave to expert e. It is 0 where every group uses the
experts alike, and the entropy of the groups where the expert names the group. Being measured on a finite table, it is
too large by about (M - 1)(E - 1) / (2 n ln 2) bits for n slots (Miller, 1955; Panzeri et al., 2007).
Shapes: T rows, K slots, M groups, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmoe.errors import BadInput
from mmoe.routing import Routing


def group_counts(
    routing: Routing, groups: Tensor | None = None, num_groups: int | None = None, *, weighted: bool = False
) -> Tensor:
    """Slots that the rows of each group gave to each expert.

    Args:
        routing: of one layer.
        groups: (T,) or (B, N) number of each row's group; rows of a negative one are left out. The modalities of the
            routing's context when None.
        num_groups: M; as many as there are when None.
        weighted: adds combine weights up instead of slots, which tells more where every row uses all experts.

    Returns:
        (M, E) int64, or fp32 where weighted. Padding and unused slots count nowhere.

    Raises:
        BadInput: the groups do not fit the rows, or there are none.

    Example:
        >>> ids = torch.tensor([[0, 1], [0, 2], [1, 3]])
        >>> one = Routing(experts=ids, weights=torch.full((3, 2), 0.5), num_experts=3)
        >>> group_counts(one, torch.tensor([0, 0, 1])).tolist()
        [[2, 1, 1], [0, 1, 0]]
    """
    if groups is None and routing.context is not None:
        groups = routing.context.modality
    rows, width = routing.experts.shape[0], routing.num_experts
    if groups is None or groups.numel() != rows:
        wrong = "the routing knows no modalities" if groups is None else f"there are {groups.numel()} of them"
        raise BadInput(f"groups of {rows} rows", wrong, "group_counts(routing, out.spliced.modality)")
    groups = groups.flatten().to(routing.experts.device)
    largest = int(groups.max()) if rows else -1
    count = largest + 1 if num_groups is None else num_groups
    if largest >= count:
        raise BadInput(f"{count} groups", f"a row is of group {largest}", f"num_groups={largest + 1}")
    there = groups >= 0 if routing.valid is None else (groups >= 0) & routing.valid
    used = (routing.experts < width) & there[:, None]  # (T, K)
    cells = (groups[:, None] * width + routing.experts)[used]
    values = routing.weights.detach().float()[used] if weighted else torch.ones_like(cells)
    return values.new_zeros(count * width).index_add_(0, cells, values).unflatten(0, (count, width))


def mutual_information(counts: Tensor) -> float:
    """Information in bits that the row and the column of a count share; see the head of this file.

    Args:
        counts: (M, E) of any non-negative numbers.

    Example:
        >>> mutual_information(torch.tensor([[5, 0], [0, 5]])), mutual_information(torch.ones(2, 3))
        (1.0, 0.0)
    """
    shares = counts.double() / counts.sum().clamp(min=1e-12)
    apart = shares.sum(1, keepdim=True) * shares.sum(0, keepdim=True)
    there = shares > 0
    return max(0.0, float((shares[there] * (shares[there] / apart[there]).log2()).sum()))


def entropy_bits(counts: Tensor) -> float:
    """Entropy of shares in bits; of the groups' own counts it is the most that an expert can tell about them.

    Args:
        counts: (M,) of any non-negative numbers.

    Example:
        >>> entropy_bits(torch.tensor([2, 2, 0]))
        1.0
    """
    shares = counts.double() / counts.sum().clamp(min=1e-12)
    return float(-(shares[shares > 0] * shares[shares > 0].log2()).sum()) or 0.0
