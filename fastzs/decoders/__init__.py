"""Decoder blocks shared by the models."""

from fastzs.decoders.blocks import CrossAttention, DecoderLayer, HeadMeanScores, Layers, RelationDescriptor, scores

__all__ = ["CrossAttention", "DecoderLayer", "HeadMeanScores", "Layers", "RelationDescriptor", "scores"]
