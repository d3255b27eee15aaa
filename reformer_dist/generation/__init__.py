"""Text from a model: how it is read (`decoder`), what comes next (`sampling`, `beam`), how it ends (`text`)."""

from reformer_dist.generation.beam import BeamOptions, Hypothesis, beam_search
from reformer_dist.generation.decoder import CachedDecoder, Decoder, UncachedDecoder, make_decoder
from reformer_dist.generation.sampling import SamplingOptions, TextSampler, generate
from reformer_dist.generation.text_stream import TextStream

__all__ = [
    "BeamOptions",
    "CachedDecoder",
    "Decoder",
    "Hypothesis",
    "UncachedDecoder",
    "TextSampler",
    "SamplingOptions",
    "TextStream",
    "beam_search",
    "generate",
    "make_decoder",
]
