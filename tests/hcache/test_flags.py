from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
from sglang.srt.arg_groups.hicache_hook import handle_hicache
from sglang.srt.server_args import ServerArgs

from sglang_hcache import flags, server_kwargs
from sglang_hcache.config import DEFAULT_PAGE_SIZE, PREFETCH_TIMEOUT_S, HCacheConfig, names_our_linker
from sglang_hcache.flags import _CONFLICTS, FlagError, add_cli_args, translate


def switched_on(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return server_kwargs(hcache_dir=str(tmp_path), **values)


def test_becomes_sglangs_own_fields(tmp_path: Path) -> None:
    two = f"{tmp_path / 'a'},{tmp_path / 'new/b'}"
    values = server_kwargs(hcache_dir=two, hcache_representation="kv", model_path="m")
    linker = values["unified_cache_external_linker_config"]
    assert values["enable_unified_cache_external_linker"] is True
    assert values["page_size"] == 64
    assert values["model_path"] == "m"
    assert not {"hicache_backend", "hcache_dir", "hcache_representation"} & values.keys()
    assert names_our_linker(linker)
    config = HCacheConfig.from_linker_extra(linker["linker_extra_config"])
    assert config == HCacheConfig((str(tmp_path / "a"), str(tmp_path / "new/b")), "kv")
    assert [(tmp_path / made).stat().st_mode & 0o777 for made in ("a", "new", "new/b")] == 3 * [0o700]


def test_codecs_are_about_hidden_states(tmp_path: Path) -> None:
    linker = switched_on(tmp_path, hcache_codec="lossy_int8")["unified_cache_external_linker_config"]
    config = HCacheConfig.from_linker_extra(linker["linker_extra_config"])
    assert (config.codec, config.representation) == ("lossy_int8", "hidden")
    with pytest.raises(FlagError, match="--hcache-codec is for hidden states"):
        switched_on(tmp_path, hcache_codec="lossy_int8", hcache_representation="kv")
    with pytest.raises(FlagError, match="--hcache-codec: 'int4' is not one of packed, lossy_int8, lossy_fp8_e4m3"):
        switched_on(tmp_path, hcache_codec="int4")


def test_the_copy_engine_can_be_avoided(tmp_path: Path) -> None:
    linker = switched_on(tmp_path, hcache_copier="kernel")["unified_cache_external_linker_config"]
    assert HCacheConfig.from_linker_extra(linker["linker_extra_config"]).copier == "kernel"
    with pytest.raises(FlagError, match="--hcache-copier: 'none' is not one of auto, kernel"):
        switched_on(tmp_path, hcache_copier="none")


def test_limits_in_gigabytes(tmp_path: Path) -> None:
    linker = switched_on(tmp_path, hcache_dir_size=2.0, hcache_read_limit=0.5)["unified_cache_external_linker_config"]
    config = HCacheConfig.from_linker_extra(linker["linker_extra_config"])
    assert (config.directory_bytes, config.read_bytes_per_s) == (2_000_000_000, 500_000_000)


@pytest.mark.parametrize("flag", ["hcache_dir_size", "hcache_read_limit"])
@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), float("nan"), "500GB"])
def test_a_limit_that_is_none(flag: str, limit: object, tmp_path: Path) -> None:
    with pytest.raises(
        FlagError, match=f"--{flag.replace('_', '-')} {limit!r} is not a positive number of gigabytes"
    ):
        switched_on(tmp_path, **{flag: limit})


@pytest.mark.parametrize("timeout", ["1,nan", "1,inf", "-1", "1,2,3", "soon"])
def test_a_timeout_that_is_none(timeout: str, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"--hcache-prefetch-timeout .* is not BASE"):
        switched_on(tmp_path, hcache_prefetch_timeout=timeout)


def test_no_time_to_read_anything_is_best_effort(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="give --hicache-storage-prefetch-policy best_effort instead"):
        switched_on(tmp_path, hcache_prefetch_timeout="0,0")


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:7400", "tcp://host.name:1", "tcp://[::1]:65535"])
def test_a_prefetcher_of_another_host(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    linker = server_kwargs(hcache_prefetcher=address)["unified_cache_external_linker_config"]
    assert linker["linker_extra_config"]["prefetcher"] == address


@pytest.mark.parametrize(
    "address",
    ["tcp://:7400", "tcp://host:99999", "tcp://host:0", "tcp://host", "tcp://host:7400/x", "host:7400", "udp://h:1"],
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(FlagError, match="is not tcp://HOST:PORT"):
        server_kwargs(hcache_prefetcher=address)


def test_default_directory_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    linker = server_kwargs()["unified_cache_external_linker_config"]
    assert linker["linker_extra_config"]["directories"] == (str(tmp_path / "sglang-hcache"),)


def test_a_page_size_that_was_asked_for_stays(tmp_path: Path) -> None:
    assert switched_on(tmp_path, page_size=128)["page_size"] == 128


def test_pages_that_are_too_small(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--page-size 1 is below 16: drop it to use 64"):
        switched_on(tmp_path, page_size=1)


def test_without_the_backend_nothing_changes() -> None:
    values = {"model_path": "m", "page_size": None, "hicache_backend": "sglang", "hcache_dir": None}
    translate(values)
    assert values == {"model_path": "m", "page_size": None}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enable_hierarchical_cache", True),
        ("hicache_storage_backend", "file"),
        ("disable_radix_cache", True),
        ("radix_cache_backend", "other"),
        ("speculative_algorithm", "NGRAM"),
        ("speculative_eagle_topk", 4),
        ("enable_multi_layer_eagle", True),
        ("dllm_algorithm", "LowConfidence"),
        ("enable_mis", True),
        ("hicache_storage_backend_extra_config", '{"prefetch_timeout_base": 5}'),
        ("hicache_storage_prefetch_retry_max_attempts", 3),
        ("hicache_io_backend", "direct"),
        ("hicache_mem_layout", "layer_first"),
        ("disaggregation_mode", "prefill"),
        ("language_only", True),
        ("encoder_only", True),
        ("pp_size", 2),
        ("dwdp_size", 2),
        ("elastic_ep_backend", "mooncake"),
        ("enable_prefill_cp", True),
        ("hicache_host_memory_mode", "buffer_only"),
        ("enable_return_routed_experts", True),
        ("enable_nvidia_megakernel", True),
        ("enable_amd_monokernel", True),
        ("kv_canary", "log"),
        ("enable_unified_memory", True),
        ("use_ray", True),
        ("unified_cache_external_linker_backend", "dynamic"),
        ("unified_cache_external_linker_config", "{}"),
    ],
)
def test_a_contradiction_names_the_flag_and_what_to_do(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(FlagError) as caught:
        switched_on(tmp_path, **{field: value})
    message = str(caught.value)
    assert message.startswith("--" + field.replace("_", "-"))
    assert "; " in message
    assert "\n" not in message


def test_a_radix_cache_that_sglang_switches_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own message, which it raises once it has resolved all arguments."""
    monkeypatch.setattr(flags, "_of_command_line", False)
    ours, others = (
        ServerArgs(
            model_path="m",
            disable_radix_cache=True,
            enable_unified_cache_external_linker=True,
            unified_cache_external_linker_backend="dynamic",
            unified_cache_external_linker_config=config,
        )
        for config in (
            HCacheConfig((str(tmp_path),)).to_linker_config(),
            {"linker": "Other", "linker_module_path": "other", "linker_extra_config": {}},
        )
    )
    with pytest.raises(FlagError, match=r"^--hicache-backend hcache needs a radix cache, .*: drop it, or"):
        flags.resolve(handle_hicache, ours)
    with pytest.raises(ValueError, match=r"^--enable-unified-cache-external-linker requires"):
        flags.resolve(handle_hicache, others)
    flags.from_cli_args(lambda _cls, args: args, ServerArgs, argparse.Namespace())
    with pytest.raises(
        SystemExit, match=r"^sglang: error: --hicache-backend hcache needs a radix cache, .*: drop it"
    ):
        flags.resolve(handle_hicache, ours)


@pytest.mark.parametrize(
    "harmless",
    [
        {"disaggregation_mode": "null"},
        {"pp_size": 1},
        {"disable_radix_cache": False},
        {"speculative_algorithm": "eagle3", "speculative_eagle_topk": 1},
    ],
)
def test_a_default_is_no_contradiction(harmless: dict[str, Any], tmp_path: Path) -> None:
    assert switched_on(tmp_path, **harmless)["enable_unified_cache_external_linker"]


def test_sglangs_defaults_are_no_contradiction(tmp_path: Path) -> None:
    fields = {field.name: field.default for field in msgspec.structs.fields(ServerArgs)}
    values = {name: fields[name] for name in _CONFLICTS}
    assert switched_on(tmp_path, **values)["enable_unified_cache_external_linker"]


@pytest.mark.parametrize("ratio", [0, -1.5, math.inf, math.nan])
def test_a_ratio_that_is_none(ratio: float, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"^--hicache-ratio .*: give a positive ratio$"):
        switched_on(tmp_path, hicache_ratio=ratio)


@pytest.mark.parametrize("keys", ["", "nowhere"])
def test_keys_that_are_none(keys: str) -> None:
    """An unset variable in a unit file must not take them away."""
    with pytest.raises(FlagError, match=f"^--hcache-keys '{keys}' is not a directory: give"):
        server_kwargs(hcache_prefetcher="tcp://host:7400", hcache_keys=keys)


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    too_much = psutil.virtual_memory().total // 10**9 + 1
    with pytest.raises(FlagError, match=f"--hicache-size {too_much} does not fit.*give at most"):
        switched_on(tmp_path, hicache_size=too_much)


def test_more_memory_than_the_container_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_hcache.flags.total_bytes", lambda: 4_500_000_000)
    assert switched_on(tmp_path, hicache_size=1, tp_size=8, nnodes=2)["hicache_size"] == 1
    with pytest.raises(FlagError, match=r"--hicache-size 1 .* 8.0 GB for 8 rank\(s\) .*4.5 GB .* give at most 0"):
        switched_on(tmp_path, hicache_size=1, tp_size=8)
    with pytest.raises(FlagError, match=r"8.0 GB for 8 rank\(s\)"):
        switched_on(tmp_path, hicache_size=1, tp_size=2, dp_size=4)
    assert switched_on(tmp_path, hicache_size=1, tp_size=4, dp_size=4, enable_dp_attention=True)["hicache_size"] == 1
    with pytest.raises(FlagError, match="give at most 4"):
        switched_on(tmp_path, hicache_size=5)


def test_memory_that_a_prefetcher_still_holds_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a quick restart the former server's arena is not free, but it is there for this one."""
    held = SimpleNamespace(total=10 * 10**9, available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: held)
    assert switched_on(tmp_path, hicache_size=8)["hicache_size"] == 8


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FlagError, match=r"--hcache-dir .*file cannot be written"):
        server_kwargs(hcache_dir=str(tmp_path / "file"))
    with pytest.raises(FlagError, match="empty path"):
        server_kwargs(hcache_dir=f"{tmp_path},")
    with pytest.raises(FlagError, match="twice"):
        server_kwargs(hcache_dir=f"{tmp_path},{tmp_path}")


def test_a_directory_that_only_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FlagError, match=r"--hcache-prefetcher keeps .* cannot be written .* or set \$XDG_CACHE_HOME"):
        server_kwargs(hcache_prefetcher="tcp://host:7400")

    def no_home() -> Path:
        raise ValueError("has no default, as this user has no home directory: name one")

    monkeypatch.setattr(flags, "default_directory", no_home)
    with pytest.raises(FlagError, match=r"--hcache-prefetcher keeps .* no home: set \$XDG_CACHE_HOME"):
        server_kwargs(hcache_prefetcher="tcp://host:7400")


def test_the_tiers_flags_do_nothing_alone() -> None:
    with pytest.raises(FlagError, match="--hcache-read-limit does nothing"):
        translate({"hcache_read_limit": 1.0})
    with pytest.raises(FlagError, match="--hcache-dir does nothing without --hicache-backend hcache"):
        translate({"hcache_dir": "/tmp/x"})


def test_the_help_can_be_printed() -> None:
    parser = argparse.ArgumentParser()
    add_cli_args(None, parser)
    shown = parser.format_help()
    assert "--hcache-dir-size" in shown
    assert "%%" not in shown


def test_all_of_them_are_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
    parser = argparse.ArgumentParser(add_help=False)
    add_cli_args(None, parser)
    for action in parser._actions:
        assert f"`{action.option_strings[0]}" in documented
        assert all(str(choice) in documented for choice in action.choices or () if choice != "sglang")
    assert f"`{PREFETCH_TIMEOUT_S[0]:g},{PREFETCH_TIMEOUT_S[1]}`" in documented
    assert f"{DEFAULT_PAGE_SIZE} with this backend" in documented
