"""What the planner has to know of a model: sizes, and what follows from them per token and layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal layers. Bytes and operations are of one token and layer, of the whole model (all ranks)."""

    name: str
    layers: int
    hidden_size: int  # elements of the attention's input
    query_heads: int
    kv_heads: int
    head_dim: int  # elements
    intermediate_size: int  # elements, of the MLP or of one expert
    vocabulary: int  # tokens
    gated_mlp: bool = True  # three matrices, not two
    experts: int = 1  # MLPs of a layer
    active_experts: int = 1  # MLPs a token passes through
    dtype_bytes: int = 2
    stored_hidden_bytes: int = 0  # of a token in a layer, where hidden states are stored in fewer; 0: as they are
    stored_kv_bytes: int = 0  # likewise, of K and V
    latent_size: int = 0  # elements a token of multi-head latent attention, which is not supported; 0: none
    mixed_attention: bool = False  # some layers see a window only, which is not supported

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "hidden_size",
            "query_heads",
            "kv_heads",
            "head_dim",
            "intermediate_size",
            "dtype_bytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def activation_bytes(self) -> int:
        return self.hidden_size * self.dtype_bytes

    @property
    def hidden_bytes(self) -> int:
        """Of hidden states as they are stored."""
        return self.stored_hidden_bytes or self.activation_bytes

    @property
    def kv_bytes(self) -> int:
        """Of K and V as they are stored."""
        return self.stored_kv_bytes or (self.latent_size or 2 * self.kv_heads * self.head_dim) * self.dtype_bytes

    @property
    def projection_parameters(self) -> int:
        """Of W_k and W_v."""
        return 2 * self.hidden_size * self.kv_heads * self.head_dim

    @property
    def projection_flop(self) -> int:
        """To make K and V from the attention's input."""
        return 2 * self.projection_parameters

    @property
    def linear_flop(self) -> int:
        """Of a forward pass without attention: two for each parameter a token meets."""
        attention = 2 * self.hidden_size * self.query_heads * self.head_dim + self.projection_parameters
        return 2 * (attention + self.active_experts * self._mlp_parameters)

    @property
    def attention_flop_per_pair(self) -> int:
        """For one query and one key it sees: a product for the score, one for the value."""
        return 4 * self.query_heads * self.head_dim

    @property
    def layer_weight_bytes(self) -> int:
        attention = 2 * self.hidden_size * self.query_heads * self.head_dim + self.projection_parameters
        return (attention + self.experts * self._mlp_parameters) * self.dtype_bytes

    @property
    def head_weight_bytes(self) -> int:
        """Of the matrix that makes logits."""
        return self.vocabulary * self.hidden_size * self.dtype_bytes

    @property
    def weight_bytes(self) -> int:
        """Of the whole model; input embeddings that are not the head's matrix come on top."""
        return self.layers * self.layer_weight_bytes + self.head_weight_bytes

    @property
    def _mlp_parameters(self) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
