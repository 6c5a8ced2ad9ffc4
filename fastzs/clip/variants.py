"""What a vision transformer can have that CLIP's own has not, as plain data that goes into a model's config.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast


@dataclass(frozen=True)
class Variant:
    """How a vision transformer differs from CLIP's. The defaults are CLIP's.

    Attributes:
        stem: timm's model whose patch embedding is taken (MobileCLIP-B, ViTamin); None: one convolution.
        stem_bias: the convolution has a bias.
        prefix: tokens before the patches, 0 or 1 (CLS).
        prefix_position: CLS has a row in the positional table.
        positions: there is a positional table.
        norm_input: there is a norm before the first block.
        tanh_gelu, gate, mlp_norm, attention_norm, norm_last: see :class:`fastzs.clip.blocks.Block`.
        rotary: arguments of timm's ``RotaryEmbeddingCat``: positions that turn queries and keys; None: there are none.
        pool: "token" (CLS), "mean" (of the patches), or "attention" (one learnt query).
        pool_prefix: the attention pool sees CLS, too.
        pool_heads, pool_width, pool_mlp: of the attention pool: heads, width of what it gives, hidden width of its MLP
            (0: it has none).
        pool_tanh_gelu: the tanh approximation of GELU in the pool's MLP.
        pool_norm: the attention pool normalises its tokens (CoCa); else the tower's last norm comes before it.
        norm_after_pool: the tower's last norm is of the pooled vector.
        projection: there is a linear layer into the text space.
        projection_bias: it has a bias.
    """

    stem: str | None = None
    stem_bias: bool = False
    prefix: int = 1
    prefix_position: bool = True
    positions: bool = True
    norm_input: bool = True
    tanh_gelu: bool = False
    gate: str | None = None
    mlp_norm: str | None = None
    attention_norm: bool = False
    norm_last: bool = False
    rotary: Mapping[str, Any] | None = None
    pool: str = "token"
    pool_prefix: bool = True
    pool_heads: int = 0
    pool_width: int = 0
    pool_mlp: int = 0
    pool_tanh_gelu: bool = False
    pool_norm: bool = False
    norm_after_pool: bool = False
    projection: bool = True
    projection_bias: bool = False

    @classmethod
    def of(cls, given: "Variant | Mapping[str, Any] | None") -> Self:
        """A variant of what :meth:`differences` gave.

        Raises:
            ValueError: unknown names.
        """
        if isinstance(given, cls):
            return given
        known = {field.name for field in fields(cls)}
        options: dict[str, Any] = dict(cast(Mapping[str, Any], given or {}))
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"vision transformer: unknown variant {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        return cls(**options)

    def differences(self) -> dict[str, Any]:
        """What differs from CLIP's own."""
        plain = asdict(type(self)())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}
