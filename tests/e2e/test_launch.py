"""The flag where people set it: on the launcher, in a configuration file, and in `sglang.Engine`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import CPU_ARGS, on_accelerator
from tests.e2e.conftest import Workshop
from tests.e2e.scenarios import LLAMA

ENGINE_SCRIPT = """
import json, sys
import sglang

def main():
    options = json.loads(sys.argv[1])
    engine = sglang.Engine(**options)
    info = engine.get_server_info()
    print(json.dumps(info["internal_states"][0]["hcache"]))
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


LAUNCH_SERVER = (sys.executable, "-W", "ignore", "-m", "sglang.launch_server")
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve", "--model-type", "llm")


def launch(*args: str, command: tuple[str, ...] = LAUNCH_SERVER) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *args], capture_output=True, text=True, timeout=240, check=False)


def test_help_shows_the_flags() -> None:
    shown = launch("--help").stdout
    for flag in ("--hicache-backend {sglang,hcache}", "--hcache-dir PATH[,PATH...]", "--hcache-representation"):
        assert flag in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--disable-radix-cache"], "--disable-radix-cache cannot be combined with --hicache-backend hcache"),
        (["--hcache-dir", "/proc/nowhere"], "--hcache-dir /proc/nowhere cannot be written"),
    ],
)
def test_a_contradiction_stops_the_launch_with_one_line(flags: list[str], says: str) -> None:
    assert_refused(launch("--model-path", "anywhere", "--hicache-backend", "hcache", *flags), says)


def test_sglang_serve_knows_the_flag() -> None:
    refused = launch("--model-path", "any", "--hicache-backend", "hcache", "--pp-size", "2", command=SGLANG_SERVE)
    assert_refused(refused, "--pp-size cannot be combined with --hicache-backend hcache")


def test_a_configuration_file_knows_the_flag(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("model-path: any\nhicache-backend: hcache\nenable-hierarchical-cache: true\n")
    refused = launch("--config", str(config))
    assert_refused(refused, "--enable-hierarchical-cache cannot be combined with --hicache-backend hcache")


def assert_refused(run: subprocess.CompletedProcess[str], says: str) -> None:
    assert run.returncode != 0
    assert says in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_engine_by_keyword(workshop: Workshop, fresh_store: Path, tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE_SCRIPT)
    words = () if on_accelerator() else CPU_ARGS
    names = (word.removeprefix("--").replace("-", "_") for word in words[::2])
    options = {
        name: float(value) if value[0].isdigit() else value for name, value in zip(names, words[1::2], strict=True)
    }
    options |= {
        "model_path": str(workshop.model(LLAMA)),
        "dtype": LLAMA.dtype,
        "max_total_tokens": 1024,
        "hicache_backend": "hcache",
        "hcache_dir": str(fresh_store),
        "hcache_representation": "hidden",  # what `auto` stores depends on what the machine delivers now
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    state = json.loads(run.stdout.splitlines()[-1])
    assert state["representation"] == "hidden"
    assert state["page_size"] == 64
    assert state["volumes"][0]["path"] == str(fresh_store)
