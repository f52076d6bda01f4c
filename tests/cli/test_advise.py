from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_hcache.cli.advise import find_shape
from sglang_hcache.cli.architectures import ARCHITECTURES
from sglang_hcache.cli.main import main
from sglang_hcache.planner.machine import GPUS

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}


def advise(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["advise", *map(str, arguments), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["advise", *map(str, arguments)]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def representations(report: dict[str, Any]) -> set[str]:
    return {one["representation"] for one in report["layers"]}


def test_heads_of_their_own_are_stored_as_hidden_states(capsys: pytest.CaptureFixture[str]) -> None:
    report = advise(capsys, "Llama-2-7B", "--gpu", "H100", "--drives", 4)
    assert representations(report) == {"hidden"}
    assert report["layers"][0]["first_layer"] == 0
    assert report["layers"][-1]["last_layer"] == 31
    assert report["bytes_per_token"] == {"plan": 32 * 8192, "kv": 32 * 16384, "hidden": 32 * 8192}


def test_grouped_heads_are_stored_as_kv(capsys: pytest.CaptureFixture[str]) -> None:
    report = advise(capsys, "Llama-3-8B", "--gpu", "H100", "--drives", 4)
    assert representations(report) == {"kv"}
    assert report["bytes_per_token"]["hidden"] == 2 * report["bytes_per_token"]["plan"]


@pytest.mark.parametrize("model", ["Llama-2-7B", "Qwen3-8B", "Gemma-7B", "OPT-30B"])
@pytest.mark.parametrize("gpu", ["A10G", "H200"])
def test_for_the_context_planned_for_no_method_is_faster(
    model: str, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for tier, drives in (("host", 0), ("ssd", 4)):
        report = advise(capsys, model, "--gpu", gpu, "--drives", drives, "--tokens", 16384)
        assert report["planned_for"] == tier
        row = next(row for row in report["times"][tier] if row["tokens"] == 16384)
        assert row["plan_s"] <= min(row["recompute_s"], row["kv_s"], row["hidden_s"]) * 1.0001
        assert 0 <= row["restored_tokens"] <= 16384


def test_times_go_from_1k_to_128k_and_grow(capsys: pytest.CaptureFixture[str]) -> None:
    report = advise(capsys, "Llama-2-13B", "--gpu", "A100-80")
    for rows in report["times"].values():
        assert [row["tokens"] for row in rows] == [1024 << step for step in range(8)]
        for method in ("recompute_s", "kv_s", "hidden_s", "plan_s"):
            assert [row[method] for row in rows] == sorted(row[method] for row in rows)
        assert all(row["plan_s"] <= row["recompute_s"] for row in rows)


def test_it_says_what_to_buy(capsys: pytest.CaptureFixture[str]) -> None:
    slow = advise(capsys, "Llama-3.1-8B", "--gpu", "H100", "--drives", 1, "--tokens", 16384)["limits"]["ssd"]
    assert slow["limit"] == "SSD"
    assert slow["text"].startswith("restoring is SSD-bound: a second drive would give 1.")
    two = advise(capsys, "Llama-3.1-8B", "--gpu", "H100", "--drives", 2, "--tokens", 16384)
    one = advise(capsys, "Llama-3.1-8B", "--gpu", "H100", "--drives", 1, "--tokens", 16384)
    gain = one["times"]["ssd"][4]["plan_s"] / two["times"]["ssd"][4]["plan_s"]
    assert slow["speedups"]["a second drive"] == pytest.approx(gain, rel=1e-6)
    assert advise(capsys, "Llama-2-7B", "--gpu", "H200")["limits"]["host"]["limit"] == "bus"
    assert advise(capsys, "Llama-2-7B", "--gpu", "A10G", "--bus-gb-s", 400)["limits"]["host"]["limit"] == "compute"


def test_where_recomputing_is_faster_it_says_from_how_many_drives_on_restoring_pays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = advise(capsys, "Llama-2-7B", "--gpu", "H200", "--drives", 1)
    ssd = report["limits"]["ssd"]
    assert ssd["limit"] == "recompute"
    needed = ssd["drives_needed"]
    assert report["planned_for"] == "host"
    assert advise(capsys, "Llama-2-7B", "--gpu", "H200", "--drives", needed)["planned_for"] == "ssd"
    assert advise(capsys, "Llama-2-7B", "--gpu", "H200", "--drives", needed - 1)["planned_for"] == "host"


def test_several_contexts_can_be_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        tokens: advise(capsys, "Llama-2-7B", "--gpu", "A10G", "--drives", 0, "--tokens", tokens)
        for tokens in ("1024", "131072", "1024,131072")
    }
    short, long, both = (report["times"]["host"] for report in found.values())
    assert short[0]["plan_s"] <= both[0]["plan_s"] < long[0]["plan_s"]
    assert long[7]["plan_s"] < both[7]["plan_s"] <= short[7]["plan_s"]


def test_a_config_and_its_folder_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my-model" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(LLAMA))
    of_file, of_folder = (advise(capsys, path, "--gpu", "A10G") for path in (file, file.parent))
    assert of_file == of_folder
    named = advise(capsys, "meta-llama/Llama-2-7b-chat-hf", "--gpu", "a10g")
    assert of_file["times"] == named["times"]
    assert of_file["model"]["name"] == "my-model"


def test_a_wrong_model_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean Llama-3" in refused(capsys, "llama-3-9b", "--gpu", "H100")
    unknown = refused(capsys, "zzzzzzz", "--gpu", "H100")
    assert "`hcache advise --list` prints all names" in unknown
    assert "did you mean" not in unknown
    assert "does not exist" in refused(capsys, tmp_path / "config.json", "--gpu", "H100")
    broken = tmp_path / "broken.json"
    for text, message in (
        ("{", "broken.json"),
        ("[]", "not a JSON object"),
        ('{"hidden_size": 8}', "no num_attention"),
    ):
        broken.write_text(text)
        assert message in refused(capsys, broken, "--gpu", "H100")
    broken.write_bytes(b"\xff\xfe\x00")
    assert "broken.json" in refused(capsys, broken, "--gpu", "H100")


def test_what_a_server_refuses_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | {"layer_types": ["linear_attention", "full_attention"]}))
    assert "without attention" in refused(capsys, config, "--gpu", "H100")
    config.write_text(json.dumps(LLAMA | {"model_type": "deepseek_v32", "index_topk": 2048}))
    assert "sparse attention" in refused(capsys, config, "--gpu", "H100")
    config.write_text(json.dumps(LLAMA | {"layer_types": 5}))
    assert "layer_types is 5, not a list of names" in refused(capsys, config, "--gpu", "H100")


@pytest.mark.parametrize(
    ("rotation", "why"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "with LongRoPE"),
        ({"rope_scaling": {"type": "su"}}, "with LongRoPE"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "with LongRoPE"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "with LongRoPE"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "(M-RoPE)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised"),
    ],
)
def test_where_hidden_states_do_not_do_kv_is_stored(
    rotation: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    harmless: list[Any] = ["linear", {}]
    for kind in harmless:
        config.write_text(json.dumps(LLAMA | {"rope_scaling": {"type": kind, "factor": 2.0}}))
        assert advise(capsys, config, "--gpu", "H100")["layers"][0]["representation"] == "hidden"
    config.write_text(json.dumps(LLAMA | rotation))
    report = advise(capsys, config, "--gpu", "H100")
    assert report["layers"] == [{"representation": "kv", "first_layer": 0, "last_layer": 31}]
    assert why in report["not_hidden"]
    assert main(["advise", str(config), "--gpu", "H100"]) == 0
    assert f"  no hidden states: {report['not_hidden']}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_name_finds_itself(name: str) -> None:
    for written in (name, name.lower(), f"org/{name}", f"{name}-Instruct", f"{name}_chat-hf", f"{name}-v0.1"):
        assert find_shape(written) is ARCHITECTURES[name]


def test_another_version_is_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3.2 has sparse attention; V2.5 is V2, trained on."""
    for name in ("DeepSeek-V3.2", "DeepSeek-V3.2-Exp", "DeepSeek", "Llama-4-8B", "Qwen-7B", "Mistral-7B-v7"):
        assert "neither a known model" in refused(capsys, name, "--gpu", "H200")
    assert refused(capsys, "DeepSeek-V3.2", "--gpu", "H200").count("DeepSeek-V3,") == 1
    for name, same in (
        ("DeepSeek-V2-Chat-0628", "DeepSeek-V2"),
        ("deepseek-ai/DeepSeek-V2.5-1210", "DeepSeek-V2"),
        ("DeepSeek-V3-0324", "DeepSeek-V3"),
        ("DeepSeek-V3.1-Base", "DeepSeek-V3"),
        ("DeepSeek-R1-0528", "DeepSeek-V3"),
        ("Mistral-7B-Instruct-v0.3", "Mistral-7B"),
    ):
        assert find_shape(name) is ARCHITECTURES[same]


def test_a_latent_is_stored_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 61 layers 576 elements; hidden states are twelve times that, and eight ranks each copy all of the latent."""
    report = advise(capsys, "DeepSeek-V3", "--gpu", "H200", "--tp", 8, "--drives", 4)
    assert representations(report) == {"kv"}
    assert report["bytes_per_token"]["plan"] == 61 * 2 * 576
    assert all(row["plan_s"] < row["recompute_s"] for row in report["times"]["host"])


def test_ranks_store_all_layers_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """A drive is shared by all, and the bus to its GPU each rank's own."""

    def stored(ranks: int, drives: int) -> set[str]:
        return representations(advise(capsys, "Llama-2-7B", "--gpu", "A10G", "--tp", ranks, "--drives", drives))

    assert stored(1, 4) == {"hidden", "kv"}
    assert len(stored(2, 4)) == 1
    assert stored(8, 1) == {"hidden"}
    assert stored(8, 0) == {"kv"}


def test_heads_that_several_ranks_have_are_stored_by_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3-235B has four of 128 elements, on eight ranks one each."""
    report = advise(capsys, "Qwen3-235B-A22B", "--gpu", "H200", "--tp", 8, "--drives", 1)
    assert report["bytes_per_token"]["kv"] == 94 * 8 * 2 * 128 * 2


def test_heads_that_ranks_cannot_share_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "Qwen2.5-7B", "--gpu", "H100", "--tp", 8)
    assert "--tp 8 does not divide the heads of Qwen2.5-7B: 28 query heads, 4 KV heads" in said
    assert "--tp 6 does not" in refused(capsys, "Phi-4-mini", "--gpu", "H100", "--tp", 6)  # 24 heads, 8 of K and V
    for ranks in (2, 4):
        advise(capsys, "Qwen2.5-7B", "--gpu", "H100", "--tp", ranks)
    advise(capsys, "Gemma-2B", "--gpu", "H100", "--tp", 8)  # K and V on each


def test_weights_without_room_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    weights = advise(capsys, "Llama-3.1-70B", "--gpu", "H100")["weights"]
    assert (weights["bytes"] // 10**9, weights["device_bytes"], weights["fit"]) == (141, 81559 * 2**20, False)
    assert main(["advise", "Llama-3.1-70B", "--gpu", "H100"]) == 0
    assert "weights (141.1 GB) do not fit in the GPUs' memory (85.5 GB)" in capsys.readouterr().out
    for options in (["--tp", "2"], ["--offload", "0.5"]):
        assert advise(capsys, "Llama-3.1-70B", "--gpu", "H100", *options)["weights"]["fit"]
        assert main(["advise", "Llama-3.1-70B", "--gpu", "H100", *options]) == 0
        assert "do not fit" not in capsys.readouterr().out


def test_weights_that_leave_too_little_for_a_pool_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "Llama-3-70B", "--gpu", "H200"]) == 0
    assert "weights (141.1 GB) leave nothing of the GPUs' memory (150.8 GB) for the KV" in capsys.readouterr().out
    assert main(["advise", "Llama-3-70B", "--gpu", "H100", "--tp", "2"]) == 0
    assert "leave 12.8 GB of the GPUs' memory (171.0 GB) for the KV pool: raise --tp" in capsys.readouterr().out
    weights = advise(capsys, "Llama-3-70B", "--gpu", "H100", "--tp", 2)["weights"]
    assert weights["pool_bytes"] == pytest.approx(0.9 * weights["device_bytes"] - weights["bytes"], abs=1)
    assert main(["advise", "Llama-3-70B", "--gpu", "H200", "--tp", "2"]) == 0
    assert "for the KV pool" not in capsys.readouterr().out


def test_quantised_weights_take_less(capsys: pytest.CaptureFixture[str]) -> None:
    """As they were released, or as is said; of activations and what is stored nothing changes."""
    for model, ranks, gb in (("DeepSeek-V3", 8, 705), ("gpt-oss-120b", 1, 63)):
        weights = advise(capsys, model, "--gpu", "H200" if ranks > 1 else "H100", "--tp", ranks)["weights"]
        assert (weights["bytes"] // 10**9, weights["fit"]) == (gb, True)
        assert weights["pool_bytes"] > 0.1 * weights["device_bytes"]
    plain, four = (
        advise(capsys, "Llama-3-70B", "--gpu", "H100", *options) for options in ([], ["--weight-bits", 4.25])
    )
    layers_bytes = plain["weights"]["bytes"] - 2 * 128256 * 8192 * 2
    saved_bytes = layers_bytes * (1 - 4.25 / 16)
    assert plain["weights"]["bytes"] - four["weights"]["bytes"] == pytest.approx(saved_bytes, abs=9)
    assert four["bytes_per_token"] == plain["bytes_per_token"]
    saved_s = plain["times"]["host"][0]["recompute_s"] - four["times"]["host"][0]["recompute_s"]
    assert saved_s == pytest.approx(saved_bytes / (0.8 * 3350e9), rel=1e-6)
    assert main(["advise", "Llama-3-70B", "--gpu", "H100", "--weight-bits", "4.25"]) == 0
    assert "Llama-3-70B (4.25 bits a weight) on H100" in capsys.readouterr().out
    for bits, stored in ((4.25, "kv"), (16, "hidden")):
        report = advise(capsys, "Llama-2-7B", "--gpu", "H100", "--weight-bits", bits)
        assert [layers["representation"] for layers in report["layers"]] == [stored]


def test_tokens_have_a_suffix(capsys: pytest.CaptureFixture[str]) -> None:
    report = advise(capsys, "Llama-2-7B", "--gpu", "H100", "--tokens", "1k,8192,32K")
    assert report["planned_tokens"] == [1024, 8192, 32768]


def test_all_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["advise", "--list"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.split() == list(ARCHITECTURES)


def test_a_wrong_machine_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "known are A100-40" in refused(capsys, "Llama-2-7B", "--gpu", "TPU")
    for wrong in (
        ["--drives", "-1"],
        ["--tokens", "8192,63"],
        ["--tokens", "8kk"],
        ["--tokens", "k"],
        ["--tokens", "16385k"],
        ["--tokens", "99999999999"],
        ["--bus-gb-s", "0"],
        ["--tp", "x"],
        ["--offload", "2"],
        ["--weight-bits", "0"],
        ["--weight-bits", "four"],
        ["--drive-gb-s", "nan"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["advise", "Llama-2-7B", "--gpu", "H100", *wrong])
        assert stopped.value.code == 2
        assert wrong[1].split(",")[-1] in capsys.readouterr().err


def test_every_model_and_gpu_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for name, shape in ARCHITECTURES.items():
        if shape.layers <= 40:
            assert main(["advise", name, "--gpu", "H100"]) == 0
    for gpu in GPUS:
        assert main(["advise", "Llama-2-7B", "--gpu", gpu, "--tp", "2", "--offload", "0.5"]) == 0
    assert "layers 0–" in capsys.readouterr().out


def test_the_table_shows_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    report = advise(capsys, "Llama-2-7B", "--gpu", "A10G")
    assert main(["advise", "Llama-2-7B", "--gpu", "A10G"]) == 0
    out = capsys.readouterr().out
    for rows in report["times"].values():
        assert f"{1000 * rows[3]['plan_s']:.1f}" in out
    assert report["limits"]["ssd"]["text"] in out
    assert "of KV (524.3 kB" in out


def test_a_plot_without_matplotlib_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "needs matplotlib" in refused(capsys, "Llama-2-7B", "--gpu", "H100", "--plot", tmp_path / "a.png")


def test_without_plot_matplotlib_is_not_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def watch(name: str, *arguments: Any, **options: Any) -> ModuleType:
        assert not name.startswith("matplotlib")
        module: ModuleType = imported(name, *arguments, **options)
        return module

    monkeypatch.setattr(builtins, "__import__", watch)
    advise(capsys, "Llama-2-7B", "--gpu", "H100")


def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "a.png"
    advise(capsys, "Llama-2-7B", "--gpu", "H100", "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "b.nonsense" in refused(capsys, "Llama-2-7B", "--gpu", "H100", "--plot", tmp_path / "b.nonsense")
