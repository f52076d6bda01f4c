"""Mixed load on a real server for a long time: memory, arena and disk must stay flat, answers must stay the same.

    python -m bench.soak [--minutes M] [--kill-every S]

Method: a small Llama is served with a host tier of four KV pools (25 MB) and a quota of 0.2 GB on disk, both much
smaller than what the load stores, so that everything is evicted all the time. Four clients hold conversations of a
few turns, drawn from 150; some requests are broken off; each prompt that was answered before must be answered the
same again. Every five seconds the resident memory of scheduler and prefetcher, the arena's slots and the directory's
size are read. After a quarter of the time (warm-up), the median memory of the last quarter may exceed that of the
second by 5 % and 16 MiB at most; slots must add up in every reading, and the directory keep its quota. Exit status
1 where one of these fails.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from bench.harness import ModelSpec, Request, RequestFailed, Server, disk_bytes, make_model, random_prompt

MODEL = ModelSpec("llama", hidden_size=128, layers=3)
QUOTA_GB = 0.2
ARGS = (
    *("--page-size", "64", "--max-total-tokens", "4096", "--chunked-prefill-size", "256"),
    *(
        "--hicache-backend",
        "hcache",
        "--hcache-plan",
        "always",
        "--hicache-ratio",
        "4",
        "--hcache-dir-size",
        str(QUOTA_GB),
    ),
)
CLIENTS = 4
CONVERSATIONS = 150
TURNS = 6
SAMPLE_S = 5.0
SLACK = 1.05
SLACK_BYTES = 16 << 20

Reading = dict[str, float]


class Load:
    """What the clients do until `stop` is set, and what they have seen."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.stop = threading.Event()
        self.answered: dict[tuple[int, int], tuple[int, ...]] = {}
        self.requests = self.different = self.failed = self.broken_off = 0
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stop.is_set():
            conversation = chance.randrange(CONVERSATIONS)
            history = random_prompt(200 + 8 * conversation, seed=conversation)
            for turn in range(chance.randint(1, TURNS)):
                if chance.random() < 0.05:
                    self._break_off(history)
                answer = self._ask(history, (conversation, turn))
                if answer is None or self.stop.is_set():
                    break
                history = [*history, *answer, *random_prompt(60, seed=1000 + 10 * conversation + turn)]

    def _ask(self, prompt: list[int], name: tuple[int, int]) -> tuple[int, ...] | None:
        try:
            answer = self.server.send(Request(prompt, 12, logprobs=False)).output_ids
        except (RequestFailed, OSError) as error:
            print(f"a request failed: {error}", file=sys.stderr)
            with self._lock:
                self.failed += 1
            return None
        with self._lock:
            self.requests += 1
            self.different += self.answered.setdefault(name, answer) != answer
        return answer

    def _break_off(self, prompt: list[int]) -> None:
        """Ask and hang up, as a client that has lost patience."""
        body = str({"input_ids": prompt, "sampling_params": {"max_new_tokens": 64}}).replace("'", '"').encode()
        head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.create_connection((self.server.host, self.server.port)) as connection:
            connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.05)
        with self._lock:
            self.broken_off += 1


def reading(server: Server, store: Path) -> Reading:
    state = server.tier_state()
    scheduler = server.pids("sglang::scheduler")[0]
    return {
        "scheduler_mb": psutil.Process(scheduler).memory_info().rss / 1e6,
        "prefetcher_mb": _private_bytes(state["prefetcher_pid"]) / 1e6,
        "disk_mb": disk_bytes(store) / 1e6,
        "pages_file": state["pages_file"],
        "slots_astray": state["pages_total"] - state["pages_free"] - state["pages_host"] - state["pages_open"],
        "restored": state["tokens_restored"],
        "evicted": state["pages_evicted"],
        "restarts": state["prefetcher_restarts"],
        "prefetcher_pid": state["prefetcher_pid"],
    }


def _private_bytes(pid: int) -> int:
    """Resident memory that is not the arena, which is bounded by itself and fills as it is used."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)


def verdicts(readings: list[Reading], load: Load) -> dict[str, bool]:
    quarter = max(1, len(readings) // 4)
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]

    def flat(name: str) -> bool:
        before, after = (statistics.median(reading[name] for reading in part) for part in (early, late))
        return after * 1e6 <= before * 1e6 * SLACK + SLACK_BYTES

    return {
        "no request failed": load.failed == 0,
        "every answer as before": load.different == 0,
        "scheduler's memory flat": flat("scheduler_mb"),
        "prefetcher's memory flat": flat("prefetcher_mb"),
        "slots add up": all(reading["slots_astray"] == 0 for reading in readings),
        "quota kept": all(reading["disk_mb"] <= QUOTA_GB * 1000 for reading in readings),
        "pages were evicted": readings[-1]["evicted"] > 0,
        "pages were restored": readings[-1]["restored"] > 0,
    }


def run(folder: Path, minutes: float, kill_every_s: float) -> bool:
    store = folder / "store"
    args = (*ARGS, "--hcache-dir", str(store))
    readings: list[Reading] = []
    with Server(make_model(folder / "model", MODEL), args, log=folder / "server.log") as server:
        load = Load(server)
        ends, kill_at = time.monotonic() + 60 * minutes, time.monotonic() + kill_every_s
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(load.client, seed) for seed in range(CLIENTS)]
            try:
                while time.monotonic() < ends and not any(client.done() for client in clients):
                    time.sleep(SAMPLE_S)
                    readings.append(reading(server, store))
                    print({name: round(value, 1) for name, value in readings[-1].items()}, load.requests, flush=True)
                    if kill_every_s and time.monotonic() > kill_at:
                        kill_at += kill_every_s
                        os.kill(int(readings[-1]["prefetcher_pid"]), signal.SIGKILL)
            finally:
                load.stop.set()
            for client in clients:
                client.result()
    found = verdicts(readings, load)
    print(
        f"\n{load.requests} requests, {load.broken_off} broken off, {load.failed} failed, {load.different} different"
    )
    for name, holds in found.items():
        print(f"{'yes' if holds else 'NO':>4}  {name}")
    return all(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kill-every", type=float, default=0.0, metavar="S", help="kill the prefetcher so often")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hcache-soak-") as folder:
        sys.exit(0 if run(Path(folder), arguments.minutes, arguments.kill_every) else 1)


if __name__ == "__main__":
    main()
