"""Layout of whole matrices in the tensors that an optimizer updates, and the exchange of split ones between ranks.

Under ZeRO, an optimizer updates flat partitions that cut matrices anywhere. `Muon` needs whole matrices, and
`Adafactor` needs sums over their rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.checkpoint import Fragment

Span = tuple[int, int]
"""(offset, length) in a flattened parameter."""


@dataclass(frozen=True)
class Piece:
    """A parameter, and where its elements are."""

    name: str
    shape: tuple[int, ...]
    start: int
    """Offset in the local tensor."""
    spans: tuple[Span, ...]
    """Part of each rank; length 0 where a rank has none."""
    rank: int

    @property
    def offset(self) -> int:
        return self.spans[self.rank][0]

    @property
    def length(self) -> int:
        """Local elements."""
        return self.spans[self.rank][1]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_whole(self) -> bool:
        """Whether some rank has all elements."""
        return any(length == self.numel for _, length in self.spans)

    def local(self, tensor: Tensor) -> Tensor:
        """The local elements [length] of a tensor that is laid out as the one that the optimizer updates."""
        return tensor.view(-1)[self.start : self.start + self.length]

    @property
    def rows(self) -> slice:
        """The rows that have local elements, the first and last of them perhaps in part."""
        width = self.shape[-1]
        return slice(self.offset // width, -(-(self.offset + self.length) // width))

    def row_block(self, values: Tensor) -> Tensor:
        """Local elements [length] as the rows [rows, columns] they are in, with zeros for those of other ranks."""
        width = self.shape[-1]
        before = self.offset - self.rows.start * width
        after = self.rows.stop * width - self.offset - self.length
        return torch.nn.functional.pad(values, (before, after)).view(-1, width)

    def from_row_block(self, block: Tensor) -> Tensor:
        """The inverse of `row_block`."""
        before = self.offset - self.rows.start * self.shape[-1]
        return block.reshape(-1)[before : before + self.length]


def whole_pieces(fragments: Iterable[Fragment], shapes: dict[str, list[int]]) -> dict[Tensor, list[Piece]]:
    """The layout of whole parameters, which every rank has."""
    return {
        each.master: [Piece(each.name, tuple(shapes[each.name]), 0, ((0, each.length),), 0)] for each in fragments
    }


def partitioned_pieces(
    fragments: Sequence[Fragment], masters: Sequence[Tensor], shapes: dict[str, list[int]]
) -> dict[Tensor, list[Piece]]:
    """The layout of this rank's flat partitions. Every rank calls it, with as many partitions.

    fragments: of this rank. masters: its partitions, in the order that all ranks have.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    number = {id(master): index for index, master in enumerate(masters)}
    local = [(number[id(each.master)], each.name, each.offset, each.length) for each in fragments]
    by_rank: list[list[tuple[int, str, int, int]]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(by_rank, local)
    spans: dict[tuple[int, str], list[Span]] = {}
    for each_rank, entries in enumerate(by_rank):
        for index, name, offset, length in entries:
            spans.setdefault((index, name), [(0, 0)] * world_size)[each_rank] = (offset, length)
    starts = {each.name: each.start for each in fragments}
    return {
        master: [
            Piece(name, tuple(shapes[name]), starts.get(name, 0), tuple(spans[index, name]), rank)
            for name in shapes
            if (index, name) in spans
        ]
        for index, master in enumerate(masters)
    }


def rounds_of_split(pieces: Sequence[Piece]) -> list[dict[int, Piece]]:
    """Split matrices in rounds by the rank that gets one whole; large ones first, spread evenly over the ranks."""
    split = sorted((piece for piece in pieces if not piece.is_whole), key=lambda piece: -piece.numel)
    if not split:
        return []
    world_size = len(split[0].spans)
    return [dict(enumerate(split[start : start + world_size])) for start in range(0, len(split), world_size)]


def exchange_device(tensor: Tensor) -> torch.device:
    """Where collectives need tensors; optimizer states may be offloaded to the host."""
    is_nccl = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else tensor.device


def gather_whole(matrices: dict[int, Piece], values: Tensor) -> Tensor | None:
    """The matrix that this rank gets whole, [rows, columns], if any. Every rank calls it.

    matrices: by the rank that gets them. values: laid out as the tensor that the optimizer updates.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sent = [matrices[to].local(values) if to in matrices else values.view(-1)[:0] for to in range(world_size)]
    mine = matrices.get(rank)
    sizes = [length for _, length in mine.spans] if mine is not None else [0] * world_size
    packed = torch.cat(sent).to(exchange_device(values))
    received = packed.new_empty(sum(sizes))
    torch.distributed.all_to_all_single(received, packed, sizes, [len(part) for part in sent])
    if mine is None:
        return None
    whole = packed.new_empty(mine.numel)
    parts = received.split(sizes)
    for (offset, length), part in zip(mine.spans, parts, strict=True):
        whole[offset : offset + length] = part
    return whole.view(mine.shape)


def scatter_whole(matrices: dict[int, Piece], whole: Tensor | None, like: Tensor) -> dict[int, Tensor]:
    """The inverse of `gather_whole`: the local elements of each matrix, by the rank that has it whole."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = matrices.get(rank)
    device = exchange_device(like)
    if mine is None or whole is None:
        packed, sizes = torch.empty(0, device=device, dtype=like.dtype), [0] * world_size
    else:
        flat = whole.reshape(-1).to(like.dtype)
        packed = torch.cat([flat[offset : offset + length] for offset, length in mine.spans])
        sizes = [length for _, length in mine.spans]
    lengths = [matrices[source].length if source in matrices else 0 for source in range(world_size)]
    received = torch.empty(sum(lengths), device=device, dtype=like.dtype)
    torch.distributed.all_to_all_single(received, packed, lengths, sizes)
    parts = received.to(like.device).split(lengths)
    return {source: part for source, part in enumerate(parts) if source in matrices}


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, the same on each."""
    total = values.to(exchange_device(values))
    torch.distributed.all_reduce(total)
    return total.to(values.device)
