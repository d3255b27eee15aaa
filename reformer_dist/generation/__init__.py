"""Text from a model: how it is read (`decoder`), what comes next (`sampling`, `beam`), how it ends (`text`)."""

from reformer_dist.generation.beam import BeamOptions, Hypothesis, beam_search
from reformer_dist.generation.decoder import CachedDecoder, Decoder, RecomputingDecoder, make_decoder
from reformer_dist.generation.sampling import Sampler, SamplingOptions, generate
from reformer_dist.generation.text import TextStream

__all__ = [
    "BeamOptions",
    "CachedDecoder",
    "Decoder",
    "Hypothesis",
    "RecomputingDecoder",
    "Sampler",
    "SamplingOptions",
    "TextStream",
    "beam_search",
    "generate",
    "make_decoder",
]
