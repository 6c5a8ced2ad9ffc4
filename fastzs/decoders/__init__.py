"""Decoder blocks shared by the models."""

from fastzs.decoders.blocks import CrossAttention, DecoderLayer, HeadMeanScores, RelationDescriptor, scores, stack

__all__ = ["CrossAttention", "DecoderLayer", "HeadMeanScores", "RelationDescriptor", "scores", "stack"]
