"""Text generation: decoders with and without KV caches, sampling, beam search, and streaming detokenization."""

from reformer_dist.generation.beam import BeamOptions, Hypothesis, beam_search
from reformer_dist.generation.decoder import CachedDecoder, Decoder, UncachedDecoder, make_decoder
from reformer_dist.generation.sampling import SamplingOptions, TextSampler, generate
from reformer_dist.generation.text_stream import TextStream

__all__ = [
    "BeamOptions",
    "CachedDecoder",
    "Decoder",
    "Hypothesis",
    "SamplingOptions",
    "TextSampler",
    "TextStream",
    "UncachedDecoder",
    "beam_search",
    "generate",
    "make_decoder",
]
