"""The linker: SGLang's external-linker interface on top of a chunk store, capture and restore."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.runtime_context import get_lora, get_model, get_parallel, get_schedule

from sglang_hcache import __version__, scheduler_hooks, windows
from sglang_hcache.adapters import Adapters
from sglang_hcache.attachment import Attachment, Client
from sglang_hcache.config import HCacheConfig
from sglang_hcache.device.streams import current_stream
from sglang_hcache.loads import Loads
from sglang_hcache.metrics import Durations
from sglang_hcache.model import Unsupported
from sglang_hcache.prefetch.connection import Unavailable
from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.queueing.admission import Admission
from sglang_hcache.queueing.forward_timer import ForwardTimer
from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.queueing.page_names import KeysOf
from sglang_hcache.queueing.prefetch_queue import PrefetchQueue
from sglang_hcache.queueing.shared_loads import SharedLoads
from sglang_hcache.ranks import of_first_rank, rank_name, true_on_all
from sglang_hcache.restoring.layer_events import LayerEvents
from sglang_hcache.restoring.restore import Load, Restorer
from sglang_hcache.saving.savers import NoSaver, RestoredKeys, Saver
from sglang_hcache.startup.registration import Registration
from sglang_hcache.startup.start import hold_rule, plan, reads_at_once, supervisor_of, supported_pools, warm_up
from sglang_hcache.storage.layout import ROOT, positions

logger = logging.getLogger(__name__)


class HCacheLinker(UnifiedCacheLinker):  # type: ignore[misc]  # SGLang is untyped here
    """One per scheduler process. SGLang calls every method from the scheduler's thread.

    `lookup` leases what it promises, so that `load` accepts on all ranks alike; it refuses only where the lease has
    been lost since. A request's lease ends when its load is done, or when SGLang releases the request.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any],
        forward_stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._config = HCacheConfig.from_linker_extra(extra_config)
        self.forward_stream = forward_stream
        self._overlaps = not get_schedule().disable_overlap_schedule
        self._one_rank = get_parallel().attn_tp_size == 1
        runner, rows_of_a_forward = scheduler_hooks.runner, scheduler_hooks.most_rows_of_a_forward()
        try:
            self._pools = pools = supported_pools(params, runner.model_config, components, rows_of_a_forward)
            capture = scheduler_hooks.capture or scheduler_hooks.why_not_captured
            self._stored, self._planner = plan(self._config, runner, capture, pools)
        except Unsupported as error:
            raise RuntimeError(f"--hicache-backend hcache cannot serve this model: {error}") from None
        self._page_tokens, self._window_pages = pools.page_tokens, pools.window_pages
        self.pools: dict[PoolName, object] = {PoolName.KV: pools.model}
        if pools.window_pages:
            self.pools[PoolName.SWA] = pools.model.swa_kv_pool
        self.layer_done_counter = LayerEvents(current_stream(pools.device), pools.model.layer_num)
        self._completed_offloads = 0
        self._offload_follows = ROOT
        self._saving: dict[str, threading.Event] = {}  # by request: retracted, but not queued again yet
        self._restored = RestoredKeys(most=2 * pools.model.size // pools.page_tokens)
        self._loads_refused = 0
        self._attachment = Attachment(
            self._stored,
            pools.device,
            self.layer_done_counter,
            forward_stream,
            capture=scheduler_hooks.capture,
            rows_of_a_forward=rows_of_a_forward,
            copy_engine=self._config.copy_engine,
            overlaps=self._overlaps,
        )
        self._registration = Registration(
            self._config,
            server_args,
            runner.model_config,
            pools,
            self._stored,
            rows_of_a_forward=rows_of_a_forward,
        )
        self.adapters = Adapters(self._config.checkpoint_memo, get_model().download_dir)
        self.adapters.loaded_at_start(get_lora().lora_paths or ())
        store = self._first_store()
        self._renewing = not store.alive
        self._restorer: Restorer | None = None
        self._saver: Saver = NoSaver()
        self._store: Client | NoStore = store
        if not isinstance(store, NoStore):
            self._attach(store)
        warm_up(self._stored, pools.page_tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what was computed so far ran on a stream that SGLang's forwards do not use
        self._forwards = ForwardTimer(self._planner, current_stream(pools.device))
        self._begin_admission(params, store)
        self._log_start()

    def _first_store(self) -> Client | NoStore:
        """Raises RuntimeError where there is no prefetcher, and none can be started."""
        try:
            self._supervisor = supervisor_of(
                self._config,
                self._registration.hello,
                opened=self._attachment.opened,
                closing=self._attachment.closing,
            )
            return self._supervisor.start()
        except (Unavailable, OSError) as error:
            raise RuntimeError(f"--hicache-backend hcache cannot reach or start a prefetcher: {error}") from None

    def _begin_admission(self, params: Any, store: Client | NoStore) -> None:
        """From now on the scheduler's steps are ours to see."""
        self.prefetch_queue = PrefetchQueue(
            store,
            hold_rule(self._config),
            self._page_tokens,
            one_rank=self._one_rank,
            planner=self._planner,
            others_save=not self._registration.saves,
            reads_at_once=reads_at_once(self._config),
            in_whole=self._window_pages > 0,
        )
        self._loads = Loads(self.layer_done_counter, self._page_tokens, self._planner, self.prefetch_queue.forget)
        self._shared = SharedLoads(of_first_rank(self._least_shared_pages()), self.prefetch_queue.put_off)
        scheduler_hooks.linker = self
        scheduler_hooks.admission = Admission(
            self,
            self.prefetch_queue,
            self._shared,
            true_on_all=list if self._one_rank else partial(true_on_all, group=params.attn_tp_cache_group),
            others_wait_for_us=bool(get_parallel().attn_dp_enabled),
            drafts=bool(self._pools.drafts),
        )

    def _least_shared_pages(self) -> int:
        """How many leading pages requests must have in common for `SharedLoads` to close a batch; 0: it closes none.

        It is 0 where loaded pages may lack windowed layers, or where SGLang may delay the next batch of prefills: for
        some steps, or until there is room for several requests.
        """
        schedule = get_schedule()
        delays = schedule.prefill_decode_interval or schedule.enable_prefill_delayer
        if self._window_pages or delays or (schedule.min_free_slots_delay or 0) > 1:
            return 0
        return self._planner.least_shared_pages()

    # ---- ahead of scheduling ----

    def queued(self, rid: str, keys: Sequence[bytes], prompt: Prompt) -> None:
        """A request has been queued whose pages `keys` are not on the device.

        It may have been queued before, and retracted or preempted while its load was landing. That load is ended
        first, lest its end give back what the request asks for now.
        """
        if rid in self._loads:
            self._loads.end_landed(wait=True)
        self.prefetch_queue.queued(rid, keys, prompt, saved=self._saving.pop(rid, None))

    def wait_for_news(self, timeout_s: float) -> None:
        """Block until there is news of a prefetch or a store, or the time is up: there is nothing else to do."""
        news = select.poll()  # `select.select` takes no descriptor beyond 1023, of which a server may have more
        news.register(self._supervisor.news, select.POLLIN)
        if news.poll(1000 * timeout_s):
            os.eventfd_read(self._supervisor.news)

    def renew_store(self) -> None:
        """Called between batches: leave a store that is gone, once nothing reads its memory, and take the next."""
        self._loads.end_landed()
        if self._store.alive:
            return
        if not self._renewing and not self._loads:
            self._renewing = True
            self._leave_store()
        if store := self._supervisor.take_next():
            self._renewing = False
            self._attach(store)
            self.prefetch_queue.attach(store)

    def _leave_store(self) -> None:
        """Drop every use of the store's memory, as a second store may not fit beside it, and have it replaced."""
        self._forget_all()
        self._saver, self._restorer = self._attachment.detach(), None
        gone, self._store = self._store, NoStore(self._store.layout, self._store.why_ended, lost=self._store.lost)
        self.prefetch_queue.attach(self._store)
        self._supervisor.replace(gone)

    # ---- lookup and load ----

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> Sequence[int]:
        """A range, on all ranks or on none, means every length up to its end: see `scheduler_hooks.around_sync`."""
        keys = KeysOf(transfers[0].keys)
        least_pages = self._shared.least(rid, transfers[0].keys)
        pages = self.prefetch_queue.ready(rid, keys, queued_pages=self._loads.queued_pages, least_pages=least_pages)
        if not self._window_pages:
            return range(1, pages + 1)
        if not pages:
            return []
        store_slots = self.prefetch_queue.leased(rid, keys)
        found = windows.ends(positions(self._store.memory, self._store.layout), store_slots, self._window_pages)
        ends = windows.up_to(found, pages) or (found[:1] if self.prefetch_queue.tries_bus(rid) else [])
        return ends[-1:] if self._one_rank else ends

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        transfer, *of_window = transfers
        keys = KeysOf(transfer.keys)
        store_slots = self.prefetch_queue.leased(rid, keys)
        if len(store_slots) < len(keys):
            self._loads_refused += 1
            self.forget_request(rid)
            return False
        self._saver.discard(transfer.device_indices)
        self._restored.add(keys)
        window_slots = of_window[0].device_indices if of_window else None
        self._loads.queue(Load(rid, tuple(store_slots), transfer.device_indices, window_slots))
        return True

    def start_layer_wise_loading(self) -> int:
        """The index of the batch that is being restored, or -1.

        SGLang itself sets it in the layer counter for text generation only, not for embedding, reward or
        classification models.
        """
        index = self._loads.start(self._restorer)
        self.layer_done_counter.set_consumer(index)  # not before: attention replayed to restore may read the pool
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Does not wait: whatever uses these slots from now on does so in a forward, behind their loads."""
        forward = self.forward_stream if self._overlaps else None
        return self._loads.finish(counter_index, current_stream(self._pools.device, forward))

    def forward_begins(self, batch: Any) -> None:
        """A forward is about to be issued; on the CPU its loads are done, on a GPU it may wait for them."""
        self._forwards.begin(batch, waits=not self._loads.all_landed())

    def forward_ended(self) -> None:
        self._forwards.end()

    def cancel_queued_load(self, rid: str) -> bool:
        return self._loads.cancel(rid)

    def forget_request(self, rid: str) -> None:
        """Give back what a request has leased, unless its load is queued or under way."""
        self._saving.pop(rid, None)
        if rid not in self._loads:
            self.prefetch_queue.forget(rid)

    # ---- offload ----

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        transfer, *of_window = transfers
        keys = [bytes.fromhex(key) for key in transfer.keys]
        window_slots = of_window[0].device_indices if of_window else None
        self._save(keys, self._offload_follows, transfer.device_indices, window_slots)
        # What the store needs of the device pages is copied or captured by now: they need not stay locked.
        self._completed_offloads += 1
        return True

    def offload_follows(self, parent: bytes) -> None:
        """The pages of the next `offload` follow this one in their prefix."""
        self._offload_follows = parent

    def retracted(
        self, rid: str, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor, windowed_tokens: int
    ) -> None:
        """Save a request's pages that are not in the radix tree and are about to be freed; it will be queued again.

        windowed_tokens: how many of the last tokens have slots in windowed layers, where these have their own slots.
        """
        if rid in self._loads:  # its load may still turn out to have failed: what was computed from it may be wrong
            return
        slots = slots.to(torch.int64, copy=True)  # another request will soon use their place in the table
        window_slots = None
        if self._window_pages:
            windowed = slots[len(slots) - windowed_tokens // self._page_tokens * self._page_tokens :]
            window_slots = self._pools.model.translate_loc_from_full_to_swa(windowed).to(torch.int64)
        self._save(keys, parent, slots, window_slots)
        self._saving[rid] = self._saver.saved()

    def _save(
        self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor, window_slots: torch.Tensor | None
    ) -> None:
        """Save these pages, except leading ones that came from the store."""
        known = self._restored.take_leading(keys)
        if known < len(keys):
            slots = slots[known * self._page_tokens :]
            if window_slots is not None:
                window_slots = window_slots[-len(slots) :]
            self._saver.save(keys[known:], keys[known - 1] if known else parent, slots, window_slots)

    def num_completed_offloads(self) -> int:
        return self._completed_offloads

    def pop_completed_offload(self) -> bool:
        self._completed_offloads -= 1
        return True

    # ---- life cycle ----

    def reset(self) -> None:
        """`/flush_cache`: empties the host tier; files stay, as HiCache's storage does."""
        self._forget_all()
        self._loads.drop_started()
        self._completed_offloads = 0
        self._store.drop_host()

    def drain(self) -> None:
        """Return once nothing is copied from the KV pool, or to it, on behalf of what has run so far."""
        self._loads.end_landed(wait=True)
        self._attachment.drain()

    def _forget_all(self) -> None:
        """Wait for the loads under way, then give up all leases and whatever is not yet in the store."""
        self._loads.wait_and_drop_queued()
        self._restored.clear()
        self.prefetch_queue.clear()
        self._saver.clear()

    def not_inserted(self, slots: torch.Tensor) -> None:
        """SGLang does not offer these device slots as they are: what was captured of them is not kept."""
        self._saver.discard(slots)

    def weights_changed(self) -> None:
        """Weights were replaced in place: no stored page fits them, and later pages do not outlive this server.

        The store for the new weights is opened between two batches: one store, however many parts they came in.
        """
        self._forget_all()
        self._registration.weights_changed()
        self._supervisor.stop_replacing()  # a store that it opens now is for the former weights
        self._renewing = False
        self._store.give_up("the weights were changed; from now on pages are kept in host memory only")

    def close(self) -> None:
        self._loads.end_landed(wait=True)
        self._attachment.close()
        self._supervisor.close()
        if not isinstance(self._store, NoStore):
            self._supervisor.close_store(self._store)

    def stats(self) -> dict[str, Any]:
        """State and counters, as shown in `/server_info` under `internal_states[i].hcache`."""
        return {
            "scheduler": rank_name(),
            "version": __version__,
            "representation": self._stored.name,
            "representation_reason": self._stored.reason,
            "layers_hidden": self._stored.layout.hidden,
            "layers_kv": self._stored.layout.kv,
            "layers_windowed": len(self._stored.windowed),
            "layers_draft": len(self._stored.drafts),
            "projector": self._stored.projector_names,
            "codec": self._config.codec,
            "bytes_per_token": sum(self._stored.row_bytes),
            "page_size": self._page_tokens,
            "page_bytes": self._store.layout.record_bytes,
            "loads_refused": self._loads_refused,
            **self._loads.stats(),
            "loads_shared": self._shared.requests,
            "prefetcher_restarts": self._supervisor.restarts,
            **self.prefetch_queue.stats(),
            **self._planner.stats(),
            **self._saver.stats(),
            **self._store.stats(),
        }

    def durations(self) -> dict[str, Durations]:
        """By the names of their metrics."""
        return {"hcache_held_seconds": self.prefetch_queue.holds, "hcache_load_seconds": self._loads.durations}

    # ---- the store ----

    def _attach(self, store: Client) -> None:
        """Save to, and restore from, this store, in the place of the former one."""
        self._store = store
        self._registration.welcomed(store.connection.welcome)
        self._saver, self._restorer = self._attachment.attach(store, saves=self._registration.saves)

    def _log_start(self) -> None:
        config = self._config
        logger.info(
            "hcache: storing %s%s (%s); host tier %d pages of %d tokens; files %s; version %s",
            ", ".join(f"{kind} of layers {first}-{last}" for kind, first, last in self._stored.layout.ranges()),
            f", kv of {len(self._stored.drafts)} draft layer(s)" if self._stored.drafts else "",
            self._stored.reason,
            len(self._store.memory),
            self._page_tokens,
            f"in {', '.join(config.directories)}" if config.prefetcher is None else f"at {config.prefetcher}",
            __version__,
        )
