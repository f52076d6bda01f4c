"""The hooks of a scheduler process that serves with the tier, and the two objects they act on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_hcache.capture import Capture
from sglang_hcache.config import HCacheConfig, Representation
from sglang_hcache.model import attention_sites

if TYPE_CHECKING:
    from sglang_hcache.linker import HCacheLinker

logger = logging.getLogger(__name__)

# A scheduler process has one target model and one linker.
runner: Any = None
capture: Capture | None = None
linker: HCacheLinker | None = None


def after_load_model(_result: None, model_runner: Any) -> None:
    """Hooks must be on the model before CUDA graphs are captured, and the staging buffer before memory is sized."""
    global runner, capture
    if model_runner.is_draft_worker:
        return
    runner = model_runner
    extra = model_runner.server_args.unified_cache_external_linker_config["linker_extra_config"]
    wanted = HCacheConfig.from_linker_extra(extra).representation
    sites = attention_sites(model_runner.model)
    width = model_runner.model_config.hidden_size
    if wanted == Representation.KV or not sites or not (wanted == Representation.HIDDEN or _smaller(width, sites)):
        return
    capture = Capture(
        sites,
        rows=_most_rows_of_a_forward(),
        width=width,
        dtype=model_runner.model_config.dtype,
        device=model_runner.device,
    )


def _smaller(width: int, sites: list[Any]) -> bool:
    """Whether hidden states have fewer elements than the K and V of all ranks. Pools of 8 bits may still say no."""
    from sglang.srt.runtime_context import get_parallel

    attention = sites[0].attention
    kv_width = attention.tp_k_head_num * attention.qk_head_dim + attention.tp_v_head_num * attention.v_head_dim
    return bool(width < kv_width * get_parallel().tp_size)


def _most_rows_of_a_forward() -> int:
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    prefill = schedule.chunked_prefill_size or 0
    return int(max(prefill if prefill > 0 else schedule.max_prefill_tokens, schedule.max_running_requests or 0, 512))


def around_forward(
    original: Callable[..., Any], model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    if capture is None or model_runner is not runner:
        return original(model_runner, forward_batch, *args, **kwargs)
    slots, positions = forward_batch.out_cache_loc, forward_batch.positions
    capture.before_forward()
    output = original(model_runner, forward_batch, *args, **kwargs)
    if slots is not None and slots.numel():
        capture.after_forward(slots, positions, from_graph=bool(output.can_run_graph))
    return output


def before_release_request(_wrapper: object, rid: str) -> None:
    if linker is not None:
        linker.forget_request(rid)


def after_weights_changed(_result: object, updater: Any, *_args: object, **_kwargs: object) -> None:
    if linker is not None:
        linker.weights_changed()


def after_internal_state(result: Any, *_args: object) -> None:
    if linker is not None:
        result.internal_state["hcache"] = linker.stats()
