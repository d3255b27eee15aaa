"""The language model: embedding, reversible stack, head. Plain PyTorch: it runs without any other package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reformer_dist.config import ModelConfig, Position
from reformer_dist.models.context import ForwardContext
from reformer_dist.models.embedding import AxialPositions, LearnedPositions, TokenEmbedding
from reformer_dist.models.head import LanguageModelHead
from reformer_dist.models.sequence import SequenceAccess, WholeSequence
from reformer_dist.models.stack import ReformerStack
from reformer_dist.ops.dropout import TokenPlaces, token_dropout
from reformer_dist.ops.lsh.health import LSHHealth
from reformer_dist.ops.rotary import rotary_tables
from reformer_dist.seeds import derive_seed

HEAD_STD = 0.02
WHOLE = WholeSequence()


class ReformerLM(nn.Module):
    """A Reformer over tokens: causal, or two-sided with config.causal=False.

    `seed` decides initial weights and hash rotations, alike on every rank and device.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.vocab_size, self.seed = config, vocab_size, seed
        self.embedding = TokenEmbedding(config, vocab_size)
        self.stack = ReformerStack(config)
        table = self.embedding.tokens.weight
        assert isinstance(table, nn.Parameter)
        self.head = LanguageModelHead(
            config.output_dim, vocab_size, config.loss_chunk, table if config.tie_embeddings else None
        )
        initialise(self, seed)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        step: int | None = None,
        dropout_seed: int | None = None,
        first_row: int = 0,
        health: list[LSHHealth] | None = None,
        sequence: SequenceAccess = WHOLE,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """tokens [B, S] -> logits [B, S, V], or with labels [B, S] the summed loss in nats (-100 is ignored).

        step: training step, which draws that step's hash rotations; None: the fixed ones of evaluation.
        dropout_seed: of this step's dropout in training mode; None draws one from torch's generator.
        first_row: number of tokens[0] among the rows of its step, which dropout masks depend on.
        key_padding_mask [B, S]: True for real tokens; positions count from the first of each row.
        health: LSH layers append their statistics.
        sequence: where the tokens are not whole sequences, which part they are (`models.sequence`); a
        `models.decoding.DecodingState` goes on with the texts that it remembers.
        logits_to_keep: of the last tokens only, where no more are wanted.
        """
        places = TokenPlaces(first_row, sequence.positions(tokens.shape[1], tokens.device, key_padding_mask))
        context = self._context(places, sequence, key_padding_mask, step, dropout_seed, health)
        hidden = self.stack(self._embed(tokens, context), context)
        if logits_to_keep is not None:
            hidden = hidden[:, -logits_to_keep:]
        logits_or_loss: Tensor = self.head(hidden, labels)
        return logits_or_loss

    def reversible_drift(
        self, tokens: Tensor, *, key_padding_mask: Tensor | None = None, sequence: SequenceAccess = WHOLE
    ) -> Tensor:
        """Largest difference between the stack's input and its reconstruction, on tokens [B, S] at hand."""
        places = TokenPlaces(0, sequence.positions(tokens.shape[1], tokens.device, key_padding_mask))
        context = self._context(places, sequence, key_padding_mask, None, None, None)
        return self.stack.reversible_drift(self._embed(tokens, context), context)

    def _embed(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        longest = self.config.max_positions
        if longest is not None and tokens.shape[1] > longest:
            raise ValueError(f"{tokens.shape[1]} tokens: this model's positions end at {longest}")
        x: Tensor = self.embedding(tokens, context.places.positions)
        return token_dropout(
            x, context.dropout(self.config.dropout), context.seed_for("embedding"), context.places
        )

    def _context(
        self,
        places: TokenPlaces,
        sequence: SequenceAccess,
        key_padding_mask: Tensor | None,
        step: int | None,
        dropout_seed: int | None,
        health: list[LSHHealth] | None,
    ) -> ForwardContext:
        if not self.training:
            dropout_seed = None
        elif dropout_seed is None:
            dropout_seed = int(torch.randint(2**62, (1,)).item())
        rotary = None
        if self.config.position is Position.rotary:
            rotary = rotary_tables(places.positions, self.config.resolved_head_dim)
        phase = "evaluation" if step is None else "training"
        rotation_seed = derive_seed("rotations", self.seed, phase, step or 0)
        return ForwardContext(dropout_seed, rotation_seed, places, sequence, key_padding_mask, rotary, health)


@torch.no_grad()
def initialise(model: ReformerLM, seed: int) -> None:
    """Initial weights, from an explicit generator.

    Linear layers: normal with deviation fan_in**-0.5, those that write to a stream divided by the root of
    the number of writes. Embeddings and positions: deviation 1, which matters (positions at 0.02 stall).
    """
    config = model.config
    generator = torch.Generator().manual_seed(derive_seed("weights", seed))
    writes = (2 * config.n_layers) ** 0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shrink = writes if name.endswith("to_out") else 1.0
            nn.init.normal_(module.weight, 0.0, module.in_features**-0.5 / shrink, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, AxialPositions):
            for table in module.tables:
                nn.init.normal_(table, 0.0, 1.0, generator)
        elif isinstance(module, LearnedPositions):
            nn.init.normal_(module.table, 0.0, 1.0, generator)
    nn.init.normal_(model.embedding.tokens.weight, 0.0, 1.0 / model.embedding.scale, generator)
    if not config.tie_embeddings:
        nn.init.normal_(model.head.weight, 0.0, HEAD_STD, generator)
    nn.init.zeros_(model.head.bias)
