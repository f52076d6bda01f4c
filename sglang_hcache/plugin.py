"""Where the package meets SGLang: every hook it attaches is named here.

SGLang calls `register` in the launcher and in every process it starts. It attaches the hooks that add the flags;
those that serve are attached in a scheduler process whose server was started with `--hicache-backend hcache`.
"""

from __future__ import annotations

import logging
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import sglang
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_hcache import TESTED_SGLANG, flags
from sglang_hcache.config import names_our_linker

logger = logging.getLogger(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_ENGINE_MODULE = "sglang.srt.entrypoints.engine"
_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_SCHEDULER = f"{_SCHEDULER_MODULE}.Scheduler"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_BATCH = "sglang.srt.managers.schedule_batch"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_WEIGHTS = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_SESSION = "sglang.srt.session.streaming_session.StreamingSession"
_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_TREE = "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
_WRAPPER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"


CALLED = (  # by our hooks, and not meant for others
    f"{_BATCH}.Req._compute_max_prefix_len",
    f"{_SCHEDULER}.init_req_max_new_tokens",
    f"{_CACHE}._all_reduce_attn_groups",
    f"{_CACHE}.checkpoint",
    f"{_CACHE}.get_last_hash_value",
    f"{_TREE}.get_prefix_hash_values",
    f"{_SESSION}.borrowed_slot",
    f"{_SESSION}.will_lend_record",
    f"{_WRAPPER}.commit_completed_offloads",
    f"{_WRAPPER}.take_completed_offloads",
    "sglang.srt.mem_cache.common._req_radix_key",
    "sglang.srt.mem_cache.radix_cache.RadixKey.maybe_to_bigram_view",
)


def register() -> None:
    """Entry point of group `sglang.srt.plugins`."""
    HookRegistry.register(f"{_SERVER_ARGS}.add_cli_args", flags.add_cli_args, HookType.AFTER)
    HookRegistry.register(f"{_SERVER_ARGS}.from_cli_args", flags.from_cli_args, HookType.AROUND)
    HookRegistry.register(f"{_SERVER_ARGS}.resolve_once", flags.resolve, HookType.AROUND)
    if engine_module := sys.modules.get(_ENGINE_MODULE):
        engine = engine_module.Engine
        engine.server_args_class = flags.EngineArguments(engine.server_args_class)
    if _SCHEDULER_MODULE in sys.modules:
        HookRegistry.register(f"{_SCHEDULER}.__init__", _before_scheduler, HookType.BEFORE)


def _before_scheduler(_scheduler: object, server_args: Any, *_args: object, **_kwargs: object) -> None:
    if names_our_linker(server_args.unified_cache_external_linker_config):
        _attach_serving_hooks()


def _serving_hooks() -> list[tuple[str, Callable[..., Any], HookType]]:
    from sglang_hcache import images
    from sglang_hcache import scheduler_hooks as hooks

    before, around, after = HookType.BEFORE, HookType.AROUND, HookType.AFTER
    return [
        (f"{_RUNNER}.load_model", hooks.after_load_model, after),
        (f"{_RUNNER}.forward", hooks.around_forward, around),
        (f"{_RUNNER}.check_weights", hooks.after_check_weights, after),
        (f"{_BATCH}.MultimodalInputs.from_processor_output", images.after_inputs, after),
        (f"{_BATCH}.Req.__init__", hooks.after_request_made, after),
        (f"{_BATCH}.release_req", hooks.before_release_req, before),
        (f"{_WRAPPER}.match", hooks.around_match, around),
        (f"{_WRAPPER}._tail_hashes", hooks.around_names, around),
        (f"{_WRAPPER}._sync_restorable_prefix", hooks.around_sync, around),
        (f"{_WRAPPER}.release_request", hooks.before_release_request, before),
        (f"{_WRAPPER}._offload_node", hooks.before_offload_node, before),
        (f"{_CACHE}.check_hicache_events", hooks.around_check_events, around),
        (f"{_CACHE}.free_kv_row", hooks.before_rows_freed, before),
        (f"{_SESSION}.try_cache_finished_req", hooks.around_turn, around),
        (f"{_SCHEDULER}.load_lora_adapter", hooks.around_load_adapter, around),
        (f"{_SCHEDULER}._add_request_to_queue", hooks.after_request_queued, after),
        (f"{_SCHEDULER}._get_new_batch_prefill_raw", hooks.around_new_batch, around),
        (f"{_ADDER}.add_chunked_req", hooks.after_chunk_added, after),
        (f"{_ADDER}.add_one_req", hooks.around_add, around),
        (f"{_SCHEDULER}.send_abort_output", hooks.around_abort_output, around),
        (f"{_SCHEDULER}.emit_metrics_constants", hooks.after_metrics_constants, after),
        (
            f"{_COMPONENTS}.request_receiver.SchedulerRequestReceiver._broadcast_reqs_across_ranks",
            hooks.around_broadcast,
            around,
        ),
        (
            f"{_COMPONENTS}.internal_state.SchedulerInternalStateController.get_internal_state",
            hooks.after_internal_state,
            after,
        ),
        (
            f"{_COMPONENTS}.weight_updater.SchedulerWeightUpdaterManager.release_memory_occupation",
            hooks.before_memory_released,
            before,
        ),
        (f"{_WEIGHTS}.update_weights_from_disk", hooks.before_weights_from_disk, before),
        (f"{_WEIGHTS}.update_weights_from_disk", hooks.after_weights_from_disk, after),
        (f"{_WEIGHTS}.begin_weight_update", hooks.after_weights_changed, after),  # RDMA may write from now on
        (f"{_WEIGHTS}.end_weight_update", hooks.after_weights_changed, after),
        (f"{_WEIGHTS}.load_weights_from_distributed", hooks.after_weights_changed, after),
        (f"{_WEIGHTS}.update_weights_from_tensor", hooks.after_weights_changed, after),
        (f"{_WEIGHTS}.update_weights_from_ipc", hooks.after_weights_changed, after),
    ]


def _page_hash_hook() -> list[tuple[str, Callable[..., Any], HookType]]:
    """Compiles SGLang's native hash now rather than on the first request; where that fails, replaces it."""
    from sglang.srt.mem_cache.cpp_utils import native_hash

    from sglang_hcache.page_hash import page_hash

    try:
        native_hash.get_native_hash([0], None)
    except RuntimeError as error:
        logger.warning("hcache: hashing pages in Python: %s (%s)", error, error.__cause__)
        return [(f"{native_hash.__name__}.get_native_hash", page_hash, HookType.REPLACE)]
    return []


def _is_there(target: str) -> bool:
    try:
        return callable(pkgutil.resolve_name(target))
    except (ImportError, AttributeError):
        return False


def _attach_serving_hooks() -> None:
    hooks = _serving_hooks() + _page_hash_hook()
    for target, hook, kind in hooks:
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    missing = [target for target, _, _ in hooks if target not in HookRegistry._patched]
    missing += [target for target in CALLED if not _is_there(target)]
    if missing:
        raise RuntimeError(
            f"--hicache-backend hcache: SGLang {sglang.__version__} lacks {', '.join(missing)}; this version of "
            f"sglang-hcache is tested with SGLang {TESTED_SGLANG}. Install one of these, or drop the flag."
        )
