"""What a scheduler process tells a prefetcher: which pages it uses, and how much memory it asks for."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_memory, get_model, get_parallel, get_schedule, get_spec
from sglang.srt.utils.hf_transformers.mistral_utils import is_mistral_model

from sglang_hcache.config import HCacheConfig
from sglang_hcache.flags import GB
from sglang_hcache.model import Pools
from sglang_hcache.prefetch.host_memory import available_bytes, total_bytes
from sglang_hcache.prefetch.messages import Hello, Welcome
from sglang_hcache.ranks import (
    first_of_its_requests,
    of_first_rank,
    of_nodes_first_rank,
    rank_name,
    ranks_of_a_node,
    replica,
)
from sglang_hcache.startup.computing import computing
from sglang_hcache.startup.fingerprint import checkpoint_identity, file_digest, fingerprint, process_identity
from sglang_hcache.startup.representation import Stored
from sglang_hcache.storage.layout import ChunkLayout

logger = logging.getLogger(__name__)

# Formats that load the very files that a checkpoint is known by; others take what was made of them at some time.
_FROM_ITS_FILES = (
    *("auto", "pt", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "sharded_state", "layered"),
    *("gguf", "bitsandbytes", "mistral"),
)
# With these, more than those files decides what is computed.
_NOT_WEIGHTS_ALONE = (
    *("kt_weight_path", "modelopt_checkpoint_restore_path", "rl_quant_profile", "forward_hooks"),
    *("decrypted_config_file", "decrypted_draft_config_file"),
)
_CHOOSES_WEIGHTS = ("pattern", "qlora_adapter_name_or_path")  # in --model-loader-extra-config


class Registration:
    """How this rank introduces itself to a prefetcher: whose pages it uses, which change with the weights."""

    def __init__(
        self,
        config: HCacheConfig,
        server_args: Any,
        model_config: Any,
        pools: Pools,
        stored: Stored,
        *,
        rows_of_a_forward: int,
    ) -> None:
        self._config = config
        self._server_args = server_args
        self._model_config = model_config
        self._pools = pools
        self._stored = stored
        self._rows_of_a_forward = rows_of_a_forward
        page_tokens = pools.page_tokens
        self._layout = ChunkLayout(page_tokens, tuple(page_tokens * row_bytes for row_bytes in stored.row_bytes))
        self._host_share, self._host_bytes = self._wanted_host_memory()
        scales = server_args.quantization_param_path
        self._scales = file_digest(Path(scales)) if scales else None  # as they have been loaded
        self._computing = tuple(computing(server_args, model_config))  # likewise
        self._this_server = of_first_rank(process_identity())
        self._weights_changes = 0
        self._weights = of_nodes_first_rank(lambda: self._weights_on_disk(config.checkpoint_memo))

    def welcomed(self, welcome: Welcome) -> None:
        """A session has begun: one rank of a node says what is different from what this server asks for."""
        if get_parallel().tp_rank % ranks_of_a_node() == 0 and not replica():
            warn_of_limits_that_do_not_hold(self._config, welcome)

    def weights_changed(self) -> None:
        """In place: nothing stored so far fits them, and nothing from now on outlives this server."""
        self._weights_changes += 1
        self._weights = None

    @property
    def saves(self) -> bool:
        """Whether this rank saves its pages: of those on a node that compute the same ones, one does."""
        return not self._stored.same_on_all_ranks or first_of_its_requests()

    @property
    def _ranks_sharing_pages(self) -> int:
        """Ranks of this node that say the same fingerprint, and ask for memory for all of them."""
        replicas = get_parallel().dp_size if self._weights is not None else 1
        own_pages = 1 if self._stored.same_on_all_ranks else min(get_parallel().attn_tp_size, ranks_of_a_node())
        return replicas * ranks_of_a_node() // own_pages

    def hello(self) -> Hello:
        sharing = self._ranks_sharing_pages if self._config.prefetcher is None else 1
        return Hello(
            pid=os.getpid(),
            name=f"{Path(self._model_config.model_path).name} {rank_name()}",
            fingerprint=self._fingerprint(),
            page_tokens=self._layout.page_tokens,
            layer_bytes=list(self._layout.layer_bytes),
            host_bytes=self._host_bytes * sharing,
            host_share=self._host_share * sharing,
            grant=self._pages_of_a_forward() if self.saves else 0,
            on_file=self._weights is not None,
            write_policy=get_memory().hicache_write_policy,
            about={
                "model": self._model_config.model_path,
                "dtype": str(self._model_config.dtype).removeprefix("torch."),
                "representation": ", ".join(filter(None, (self._stored.name, self._config.codec))),
            },
        )

    def _pages_of_a_forward(self) -> int:
        """Slots to have ready: for the new pages of a forward, twice, and one for each running request."""
        pages = -(-self._rows_of_a_forward // self._layout.page_tokens)
        return 2 * pages + (get_schedule().max_running_requests or 64)

    def _weights_on_disk(self, memo: Path) -> str | None:
        """All weights: of the model, of a draft model, of an encoder elsewhere. None if they are unknown.

        Those of an adapter are a part of its pages' keys.
        """
        model = get_model()
        try:
            if model.load_format not in _FROM_ITS_FILES:
                raise OSError(f"--load-format {model.load_format} takes them from elsewhere")
            if model.weight_cache_mode != "off":
                raise OSError(f"--weight-cache-mode {model.weight_cache_mode} shares those of another process")
            for name in _NOT_WEIGHTS_ALONE:
                if getattr(self._server_args, name):
                    raise OSError(f"--{name.replace('_', '-')} changes the model")
            for name in _CHOOSES_WEIGHTS:
                if name in str(self._server_args.model_loader_extra_config):
                    raise OSError(f"--model-loader-extra-config chooses them by {name}")
            path, revision, cache = self._model_config.model_path, model.revision, model.download_dir
            parts: list[object] = [checkpoint_identity(path, memo, revision=revision, cache=cache)]
            if self._stored.drafts:
                parts.append(self._draft_on_disk(memo))
            if encoder := getattr(self._model_config.hf_config, "mm_vision_tower", None):
                parts.append(self._encoder_on_disk(encoder, memo))
            return repr(parts) if len(parts) > 1 else str(parts[0])
        except (OSError, ValueError) as error:
            logger.warning(
                "hcache: the weights of %s cannot be identified (%s): pages are kept in host memory only",
                self._model_config.model_path,
                error,
            )
            return None

    def _draft_on_disk(self, memo: Path) -> tuple[object, ...]:
        """Its weights, and what is computed with them. Raises OSError."""
        spec = get_spec()
        if spec.speculative_draft_load_format not in (None, *_FROM_ITS_FILES):
            flag = f"--speculative-draft-load-format {spec.speculative_draft_load_format}"
            raise OSError(f"{flag} takes the draft model's from elsewhere")
        path, revision = spec.speculative_draft_model_path, spec.speculative_draft_model_revision
        if path is None:  # layers of the model's own checkpoint
            path, revision = self._model_config.model_path, get_model().revision
        weights = checkpoint_identity(path, memo, revision=revision, cache=get_model().download_dir)
        quantized = spec.speculative_draft_model_quantization, spec.speculative_draft_kv_cache_dtype
        return spec.speculative_algorithm, weights, spec.speculative_draft_load_format, quantized

    def _encoder_on_disk(self, named: str, memo: Path) -> str:
        """Identity of an encoder that LLaVA's checkpoints name: another checkpoint, or a folder. Raises OSError."""
        inside = Path(self._model_config.model_path, named)
        return checkpoint_identity(str(inside) if inside.is_dir() else named, memo)

    def _fingerprint(self) -> bytes:
        codec = self._stored.of(0).codec
        parts: list[tuple[str, object]] = [
            ("model", self._weights or f"{self._this_server}, change {self._weights_changes}"),
            ("loading", (get_model().load_format, _parser(self._model_config), str(self._model_config.model_impl))),
            ("override", self._server_args.json_model_override_args),
            ("dtype", str(self._model_config.dtype)),
            ("kv_dtype", str(self._pools.model.dtype)),
            ("kv_scales", self._scales),
            ("quantization", self._model_config.quantization),
            ("page_size", self._layout.page_tokens),
            ("row_bytes", self._stored.row_bytes),
            ("hidden_layers", self._stored.layout.hidden),
            ("codec", (self._config.codec, codec.identity if codec is not None else None)),
        ]
        if windowed := self._stored.windowed:
            parts.append(("windowed_layers", windowed))
        if self._pools.drafts:
            parts.append(("draft_kv", [str(pool.dtype) for pool in self._pools.drafts]))
        parts += self._computing
        if not self._stored.same_on_all_ranks:
            parallel = get_parallel()
            parts.append(("rank", (parallel.attn_tp_rank, parallel.attn_tp_size)))
        return fingerprint(parts)

    def _wanted_host_memory(self) -> tuple[float, int]:
        """The most host memory for this rank: as a share of what is free (0: no such limit), and in bytes.

        Only the prefetcher knows how much is free, as it may hold a former server's arena. With a remote prefetcher
        the memory is this process's own.
        """
        memory, ranks = get_memory(), get_parallel().dp_size * ranks_of_a_node()
        if memory.hicache_size > 0:
            return 0.0, int(memory.hicache_size * GB)
        ratio: float = memory.hicache_ratio
        tokens = self._pools.model.size + self._layout.page_tokens  # buffers may have addresses without memory, too
        wanted = int(ratio * tokens * self._stored.pool_row_bytes)
        if (fraction := memory.hicache_host_memory_fraction) is not None:  # nobody has asked for a size or a ratio
            if self._config.prefetcher is not None:
                return 0.0, min(wanted, int(fraction * available_bytes()) // ranks)
            return fraction / ranks, wanted
        if wanted > (total := total_bytes() // ranks):
            raise RuntimeError(
                f"--hicache-ratio {ratio:g} does not fit: {wanted / GB:.1f} GB of host memory for this rank, "
                f"{total / GB:.1f} GB in all; give a smaller ratio, or --hicache-size"
            )
        return 0.0, wanted


def _parser(model_config: Any) -> str:
    """What parses the model's configuration, which decides how K is rotated; SGLang's `auto` goes by the name."""
    named: str = model_config.model_config_parser
    return "mistral" if named == "auto" and is_mistral_model(model_config.model_path) else named


def warn_of_limits_that_do_not_hold(config: HCacheConfig, welcome: Welcome) -> None:
    """A prefetcher that ran already keeps those it was started with, whatever this server's flags say."""
    limits = (
        ("--hcache-dir-size", config.directory_bytes, welcome.quota_bytes, "the default"),
        ("--hcache-read-limit", config.read_bytes_per_s, welcome.read_bytes_per_s, "no limit"),
    )
    for flag, wanted, held, unset in limits:
        if wanted is not None and held != wanted:
            logger.warning(
                "hcache: %s %g is not in force: the prefetcher of %s runs already, with %s",
                flag,
                wanted / GB,
                ",".join(config.directories),
                f"{held / GB:g}" if held is not None else unset,
            )
