"""The flag where people set it: on the launcher, in a configuration file, and in `sglang.Engine`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.harness import CPU_ARGS, on_accelerator
from tests.e2e.conftest import Workshop
from tests.e2e.scenarios import LLAMA, whole_pages

ENGINE_SCRIPT = """
import json, sys
import sglang

def main():
    options = json.loads(sys.argv[1])
    engine = sglang.Engine(**options)

    def ask(seed):
        prompt = [100 + (seed * token) % 97 for token in range(700)]
        answer = engine.generate(input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": 8})
        cached = answer["meta_info"].get("cached_tokens_details") or {}
        return answer["output_ids"], cached.get("host", 0)

    answers = [ask(seed) for seed in (3, 5, 7, 3)]
    state = engine.get_server_info()["internal_states"][0]["hcache"]
    print(json.dumps({"first": answers[0], "again": answers[-1], "state": state}))
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


HANGS_S = 600.0  # six of them import SGLang at once, beside other tests
Run = subprocess.CompletedProcess[str]

LAUNCH_SERVER = (sys.executable, "-W", "ignore", "-m", "sglang.launch_server")
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve", "--model-type", "llm")


HCACHE = ("--hicache-backend", "hcache")
CONFLICT = "cannot be combined with --hicache-backend hcache"
REFUSED = {
    "--disable-radix-cache": (LAUNCH_SERVER, ("--model-path", "any", *HCACHE, "--disable-radix-cache"), CONFLICT),
    "--hcache-dir": (
        LAUNCH_SERVER,
        ("--model-path", "any", *HCACHE, "--hcache-dir", "/proc/nowhere"),
        "/proc/nowhere cannot be written",
    ),
    "--pp-size": (SGLANG_SERVE, ("--model-path", "any", *HCACHE, "--pp-size", "2"), CONFLICT),
    "--enable-hierarchical-cache": (LAUNCH_SERVER, ("--config", "server.yaml"), CONFLICT),
}


@pytest.fixture(scope="module")
def launched(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """What each command, of which only `engine` serves, has printed; all at once, as most of it is imports."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "server.yaml").write_text("model-path: any\nhicache-backend: hcache\nenable-hierarchical-cache: true\n")
    (folder / "engine.py").write_text(ENGINE_SCRIPT)
    commands = {flag: (*command, *args) for flag, (command, args, _) in REFUSED.items()}
    commands["--help"] = (*LAUNCH_SERVER, "--help")
    commands["engine"] = (sys.executable, "engine.py", json.dumps(engine_options(workshop.model(LLAMA), folder)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def launch(command: tuple[str, ...]) -> Run:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=HANGS_S, env=environment, check=False
        )

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(launch, commands.values()), strict=True))


def engine_options(model: Path, folder: Path) -> dict[str, object]:
    words = () if on_accelerator() else CPU_ARGS
    names = (word.removeprefix("--").replace("-", "_") for word in words[::2])
    options: dict[str, object] = {
        name: float(value) if value[0].isdigit() else value for name, value in zip(names, words[1::2], strict=True)
    }
    return options | {
        "model_path": str(model),
        "dtype": LLAMA.dtype,
        "max_total_tokens": 1024,
        "hicache_backend": "hcache",
        "hcache_dir": str(folder / "store"),
        "hcache_plan": "always",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hcache_representation": "hidden",  # what `auto` stores depends on what the machine delivers now
    }


def test_help_shows_the_flags(launched: dict[str, Run]) -> None:
    shown = launched["--help"].stdout
    for flag in ("--hicache-backend {sglang,hcache}", "--hcache-dir PATH[,PATH...]", "--hcache-representation"):
        assert flag in shown


@pytest.mark.parametrize("flag", REFUSED)
def test_a_contradiction_stops_the_launch_with_one_line(flag: str, launched: dict[str, Run]) -> None:
    """By the launcher, by `sglang serve`, and out of a configuration file."""
    run, says = launched[flag], REFUSED[flag][2]
    assert run.returncode != 0
    assert f"{flag} {says}" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_engine_by_keyword(launched: dict[str, Run]) -> None:
    run = launched["engine"]
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    (first, restored_of_none), (again, restored), state = found["first"], found["again"], found["state"]
    assert (restored_of_none, restored) == (0, whole_pages(699))
    assert again == first
    assert state["representation"] == "hidden"
    assert state["page_size"] == 64
    assert state["volumes"][0]["path"].endswith("/store")
