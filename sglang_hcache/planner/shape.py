"""What the planner needs to know of a model: its dimensions, and bytes and FLOP per token and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (MLA): the pool keeps one vector of a token, of which all heads make K and V."""

    rank: int  # elements of the vector
    rope_dim: int  # elements of K that are rotated, the same for all heads, and kept beside it
    nope_dim: int  # elements of a head's K that are made of the vector
    query_rank: int = 0  # elements that queries are made of; 0: of the attention's input

    @property
    def size(self) -> int:
        """Elements that are kept of a token."""
        return self.rank + self.rope_dim


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
    latent: Latent | None = None  # with MLA; `head_dim` is that of V then
    windowed_layers: int = 0  # whose queries see a sliding window of tokens only; their K and V are kept all the same
    window: int = 0  # tokens
    weight_bits: float = 0.0  # of a parameter of the layers, where weights are quantised; 0: as of activations
    tied_embeddings: bool = True  # the matrix that makes logits is that of the input

    def __post_init__(self) -> None:
        if isinstance(self.latent, Mapping):  # from a file
            object.__setattr__(self, "latent", Latent(**self.latent))
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
        if not 0 <= self.weight_bits <= 64:
            raise ValueError(f"weight_bits must be between 0 and 64, not {self.weight_bits}")
        if not 0 <= self.windowed_layers <= self.layers or (self.windowed_layers and self.window < 1):
            raise ValueError(f"{self.windowed_layers} of {self.layers} layers see {self.window} tokens")

    @property
    def activation_bytes(self) -> int:
        return self.hidden_size * self.dtype_bytes

    @property
    def hidden_bytes(self) -> int:
        """Of hidden states as they are stored."""
        return self.stored_hidden_bytes or self.activation_bytes

    @property
    def kv_bytes(self) -> int:
        """Of K and V as they are stored, each head once."""
        elements = self.latent.size if self.latent is not None else 2 * self.kv_heads * self.head_dim
        return self.stored_kv_bytes or elements * self.dtype_bytes

    def kv_shares(self, ranks: int) -> int:
        """Ranks among which K and V are divided; each has all of MLA's latent."""
        return 1 if self.latent is not None else min(ranks, self.kv_heads)

    def kv_copies(self, ranks: int) -> int:
        """How often each head's K and V are stored: several times if ranks outnumber heads; a latent only once."""
        return 1 if self.latent is not None else ranks // self.kv_shares(ranks)

    @property
    def projection_parameters(self) -> int:
        """Of W_k and W_v, or of what makes the latent."""
        if self.latent is not None:
            return self.hidden_size * self.latent.size
        return 2 * self.hidden_size * self.kv_heads * self.head_dim

    @property
    def projection_flop(self) -> int:
        """To make K and V from the attention's input."""
        return 2 * self.projection_parameters

    @property
    def linear_flop(self) -> int:
        """Of a forward pass without attention: two for each parameter a token meets."""
        return 2 * (self._attention_parameters + self.active_experts * self._mlp_parameters)

    @property
    def attention_flop_per_pair(self) -> int:
        """For one query and one key it sees: a product for the score, one for the value."""
        return 2 * self.query_heads * (self._score_dim + self.head_dim)

    @property
    def layer_weight_bytes(self) -> int:
        return self._bytes_of(self._attention_parameters + self.experts * self._mlp_parameters)

    @property
    def projection_weight_bytes(self) -> int:
        return self._bytes_of(self.projection_parameters)

    @property
    def head_weight_bytes(self) -> int:
        """Of the matrix that makes logits, which is not quantised, as embeddings are not."""
        return self.vocabulary * self.hidden_size * self.dtype_bytes

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return self.layers * self.layer_weight_bytes + (2 - self.tied_embeddings) * self.head_weight_bytes

    def _bytes_of(self, parameters: int) -> int:
        return int(parameters * self.weight_bits / 8) if self.weight_bits else parameters * self.dtype_bytes

    @property
    def _score_dim(self) -> int:
        """Elements of a head's query and key."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim

    @property
    def _attention_parameters(self) -> int:
        queries, output = self.query_heads * self._score_dim, self.hidden_size * self.query_heads * self.head_dim
        if self.latent is None:
            return self.hidden_size * queries + self.projection_parameters + output
        query_rank = self.latent.query_rank
        of_queries = query_rank * (self.hidden_size + queries) if query_rank else self.hidden_size * queries
        expansion = self.latent.rank * self.query_heads * (self.latent.nope_dim + self.head_dim)
        return of_queries + self.projection_parameters + expansion + output

    @property
    def _mlp_parameters(self) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
