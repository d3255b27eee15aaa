"""MatrixOptimizer: AdamW, Muon or Adafactor by parameter group, of whole parameters or of ZeRO's partitions.

The updates are those of torch.optim.AdamW, Muon and Adafactor on whole parameters, at every ZeRO stage. The Muon
of DeepSpeed is another: it measures and clips the norm of the orthogonalized update instead of the gradient's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from reformer_dist.config import OptimConfig
from reformer_dist.engine.groups import Group, Update
from reformer_dist.engine.matrix_layout import (
    Piece,
    exchange_device,
    gather_whole,
    rounds_of_split,
    scatter_whole,
    sum_over_ranks,
)

# the quintic of arXiv 2502.16982 and of https://kellerjordan.github.io/posts/muon, as in torch.optim.Muon
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS, NORM_EPS = 5, 1e-7
# arXiv 1804.04235, algorithm 4; its epsilon_1 is the square of EPS1
BETA2_DECAY, EPS1, EPS2, MAX_UPDATE_RMS = -0.8, 1e-15, 1e-3, 1.0
FACTORS = ("row_var", "col_var")


class MatrixOptimizer(torch.optim.Optimizer):
    """Updates by parameter group. Gradients are used up."""

    def __init__(self, groups: Sequence[Group], config: OptimConfig, dtype: torch.dtype) -> None:
        """dtype: of Muon's matrix products."""
        super().__init__([group.to_torch() for group in groups], {"lr": 0.0})
        self.factors: dict[str, dict[str, Tensor]] = {}
        """Adafactor's second moments of matrices: means over columns [rows] and over rows [columns], by name."""
        self._config, self._dtype = config, dtype
        self._layout: dict[Tensor, list[Piece]] = {}
        self._is_split = False

    def attach(self, layout: dict[Tensor, list[Piece]], *, is_split: bool) -> None:
        """layout: the parameters in each tensor that DeepSpeed hands over. is_split: over the ranks."""
        self._layout, self._is_split = layout, is_split

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue
                state = self.state[master]
                if "step" not in state:
                    state["step"] = torch.zeros((), device=master.device)  # where fused AdamW needs it
                for moment in group["update"].moments:
                    if moment not in state:
                        state[moment] = torch.zeros_like(master)
                if group["update"] is Update.adamw:
                    self._adamw(master, state, group)
                elif group["update"] is Update.muon:
                    self._muon(master, state, group)
                else:
                    self._adafactor(master, state, group)

    def _adamw(self, master: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self._config.betas
        adamw(
            [master],
            [master.grad],  # type: ignore[list-item]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._config.eps,
            maximize=False,
        )

    def _muon(self, master: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        grad, momentum = master.grad, state["momentum_buffer"]
        assert grad is not None
        state["step"] += 1
        momentum.lerp_(grad, 1.0 - self._config.momentum)
        update = grad.lerp_(momentum, self._config.momentum)  # Nesterov's
        master.mul_(1.0 - group["lr"] * group["weight_decay"])

        def apply(piece: Piece, values: Tensor) -> None:
            rows, columns = piece.shape
            piece.local(master).add_(values.reshape(-1), alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))

        pieces = self._layout[master]
        for piece in pieces:
            if piece.is_whole and piece.length:
                matrix = piece.local(update).view(piece.shape).to(exchange_device(update))
                apply(piece, orthogonalize(matrix, self._dtype).to(master))
        for matrices in rounds_of_split(pieces):
            whole = gather_whole(matrices, update)
            if whole is not None:
                whole = orthogonalize(whole, self._dtype)
            for rank, values in scatter_whole(matrices, whole, update).items():
                apply(matrices[rank], values)

    def _adafactor(self, master: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        grad, pieces, lr = master.grad, self._layout[master], group["lr"]
        assert grad is not None
        state["step"] += 1
        step = state["step"].item()
        new_share = step**BETA2_DECAY
        sizes = self._sum(torch.stack([piece.local(master).square().sum() for piece in pieces]))
        if group["update"] is Update.adafactor:
            self._update_factors(master, grad, new_share)
            for piece in pieces:
                if piece.length:
                    block = piece.row_block(piece.local(grad))
                    block.mul_(self._variance(piece).clamp_(min=EPS1 * EPS1).rsqrt_())
                    piece.local(grad).copy_(piece.from_row_block(block))
        else:
            variance = state["variance"].lerp_(grad.square(), new_share)
            grad.mul_(variance.clamp(min=EPS1 * EPS1).rsqrt_())
        updates = self._sum(torch.stack([piece.local(grad).square().sum() for piece in pieces]))
        master.mul_(1.0 - lr * group["weight_decay"])
        relative = min(lr, 1.0 / math.sqrt(step))
        for piece, size, update in zip(pieces, sizes.tolist(), updates.tolist(), strict=True):
            scale = relative * max(EPS2, math.sqrt(size / piece.numel))
            too_large = max(1.0, math.sqrt(update / piece.numel) / MAX_UPDATE_RMS)
            piece.local(master).add_(piece.local(grad), alpha=-scale / too_large)

    def _update_factors(self, master: Tensor, grad: Tensor, new_share: float) -> None:
        """Adds the squared gradients of this step to the factors of the matrices in `master`."""
        pieces = self._layout[master]
        sums = []
        for piece in pieces:
            rows, columns = piece.shape
            by_row, by_column = master.new_zeros(rows), master.new_zeros(columns)
            if piece.length:
                squares = piece.row_block(piece.local(grad)).square_()
                by_row[piece.rows] = squares.sum(dim=1)
                by_column = squares.sum(dim=0)
            sums += [by_row / columns, by_column / rows]
        means = iter(self._sum(torch.cat(sums)).split([len(part) for part in sums]))
        for piece in pieces:
            factors = self.factors.setdefault(piece.name, {})
            for kind, size in zip(FACTORS, piece.shape, strict=True):
                factors.setdefault(kind, master.new_zeros(size)).lerp_(next(means), new_share)

    def _variance(self, piece: Piece) -> Tensor:
        """The second moments of the rows that have local elements, [rows, columns]."""
        row_var, col_var = (self.factors[piece.name][kind] for kind in FACTORS)
        return torch.outer(row_var[piece.rows], col_var).div_(row_var.mean().clamp(min=EPS1))

    def _sum(self, local: Tensor) -> Tensor:
        return sum_over_ranks(local) if self._is_split else local


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix [rows, columns] in `dtype`, by five Newton-Schulz steps, roughly.

    Its singular values are between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if is_tall else matrix).to(dtype, copy=True)
    x.div_(x.norm().clamp(min=NORM_EPS))
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
