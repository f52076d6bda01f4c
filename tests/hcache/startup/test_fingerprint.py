from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_hcache.startup.fingerprint import checkpoint_identity, fingerprint, process_identity


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "modeling.py").write_text("SCALE = 1")
    (folder / "model-1.safetensors").write_bytes(os.urandom(50_000))
    (folder / "model-2.safetensors").write_bytes(os.urandom(50_000))
    return folder


def flip_one_bit_of_the_weights(folder: Path) -> None:
    weights = folder / "model-2.safetensors"
    content = bytearray(weights.read_bytes())
    content[31_337] ^= 1
    weights.write_bytes(content)


def change_the_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 9}')


def drop_a_file(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()


def change_the_code(folder: Path) -> None:
    (folder / "modeling.py").write_text("SCALE = 2")


@pytest.mark.parametrize(
    "change", [flip_one_bit_of_the_weights, change_the_configuration, change_the_code, drop_a_file]
)
def test_any_change_is_another_model(change: Callable[[Path], None], checkpoint: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    before = checkpoint_identity(str(checkpoint), memo)
    change(checkpoint)
    assert checkpoint_identity(str(checkpoint), memo) != before


@pytest.mark.parametrize(
    "name",
    [
        *("hf_quant_config.json", "quantize_config.json", "quant_model_description.json", "params.json"),
        "model.safetensors.index.json",
    ],
)
def test_nor_is_another_file_of_configuration_left_out(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """What SGLang reads beside, or instead of, config.json."""
    memo, identities = tmp_path / "memo.json", set()
    for content in (None, '{"bits": 4}', '{"bits": 8}'):
        if content is not None:
            (checkpoint / name).write_text(content)
        identities.add(checkpoint_identity(str(checkpoint), memo))
    assert len(identities) == 3


@pytest.mark.parametrize("name", ["config.json", "modeling.py"])
def test_beside_a_file_of_weights_is_its_configuration(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(os.urandom(1000))
    memo, identities = tmp_path / "memo.json", set()
    for content in (None, "1", "2"):
        if content is not None:
            (tmp_path / name).write_text(content)
        identities.add(checkpoint_identity(str(tmp_path / "model.gguf"), memo))
    assert len(identities) == 3


def test_the_tokenizer_is_no_part_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    before = checkpoint_identity(str(checkpoint), memo)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (checkpoint / name).write_text("{}")
    assert checkpoint_identity(str(checkpoint), memo) == before


def test_a_copy_elsewhere_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    memo = tmp_path / "memo.json"
    assert checkpoint_identity(str(copy), memo) == checkpoint_identity(str(checkpoint), memo)


def test_the_memo_saves_reading(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which may take minutes: the log says so."""
    memo = tmp_path / "memo.json"
    caplog.set_level(logging.INFO)
    identity = checkpoint_identity(str(checkpoint), memo)
    assert memo.stat().st_mode & 0o777 == 0o600

    assert [record.message.split(",")[0] for record in caplog.records] == [
        "hcache: reading 0.0 GB of weights",
        "hcache: the weights are read",
    ]

    def refuse(_weights: object) -> list[str]:
        raise AssertionError("weights are read again")

    monkeypatch.setattr("sglang_hcache.startup.fingerprint._digests", refuse)
    assert checkpoint_identity(str(checkpoint), memo) == identity


def test_weights_in_the_place_of_others_are_not_taken_for_them(checkpoint: Path, tmp_path: Path) -> None:
    """As an archive with all times set to a constant leaves them: with the inode, size and time of the former."""
    memo, weights = tmp_path / "memo.json", checkpoint / "model-2.safetensors"
    weights.write_bytes(bytes(1_000_000))
    os.utime(weights, (0, 0))
    former, before = weights.stat(), checkpoint_identity(str(checkpoint), memo)
    flip_one_bit_of_the_weights(checkpoint)
    while weights.stat().st_ctime_ns == former.st_ctime_ns or weights.stat().st_mtime_ns:
        os.utime(weights, (0, 0))
    assert (weights.stat().st_ino, weights.stat().st_size) == (former.st_ino, former.st_size)
    assert checkpoint_identity(str(checkpoint), memo) != before


@pytest.mark.parametrize("at", [0, 500_000, 999_999])
def test_nor_are_those_of_an_image_without_times(
    at: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only one, which another one takes the place of."""
    memo, weights, stat = tmp_path / "memo.json", checkpoint / "model-2.safetensors", Path.stat
    weights.write_bytes(bytes(1_000_000))
    times = {"st_mtime_ns": 0, "st_ctime_ns": 0}

    def without_times(path: Path, **options: bool) -> SimpleNamespace:
        info = stat(path, **options)
        return SimpleNamespace(**{name: getattr(info, name) for name in dir(info) if name.startswith("st_")} | times)

    monkeypatch.setattr(Path, "stat", without_times)
    before = checkpoint_identity(str(checkpoint), memo)
    with weights.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 70_000)
        file.truncate(1_000_000)
    assert checkpoint_identity(str(checkpoint), memo) != before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", None])
def test_a_damaged_memo_changes_nothing(content: bytes | None, checkpoint: Path, tmp_path: Path) -> None:
    identity = checkpoint_identity(str(checkpoint), tmp_path / "other.json")
    memo = tmp_path / "memo.json"
    if content is None:
        memo.mkdir()
    else:
        memo.write_bytes(content)
    assert checkpoint_identity(str(checkpoint), memo) == identity


def test_no_flipped_bit_of_the_memo_changes_the_identity(checkpoint: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    identity = checkpoint_identity(str(checkpoint), memo)
    written = memo.read_bytes()
    for bit in range(0, 8 * len(written), 5):
        damaged = bytearray(written)
        damaged[bit // 8] ^= 1 << bit % 8
        memo.write_bytes(damaged)
        assert checkpoint_identity(str(checkpoint), memo) == identity, bit


def test_no_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weight files"):
        checkpoint_identity(str(tmp_path), tmp_path / "memo.json")


def test_parts_do_not_run_together() -> None:
    assert len(fingerprint([("a", 1)])) == 16
    assert fingerprint([("a", "1"), ("b", "2")]) != fingerprint([("a", "1\nb='2'")])
    assert process_identity() != process_identity()


@pytest.fixture
def hub(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, with revisions `main` and `old` of `org/name`, links and all."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    fill(cache, checkpoint, "main", "1111")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    change_the_configuration(other)
    fill(cache, other, "old", "2222")
    return cache


def fill(cache: Path, checkpoint: Path, reference: str, commit: str, *, only: str = "*") -> None:
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for folder in ("refs", "blobs"):
        (repository / folder).mkdir(exist_ok=True)
    (repository / "refs" / reference).write_text(commit)
    for file in checkpoint.glob(only):
        blob = repository / "blobs" / f"{commit}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)


def test_an_id_of_the_hub_is_the_snapshot_it_stands_for(hub: Path, checkpoint: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    identity = checkpoint_identity(str(checkpoint), memo)
    assert checkpoint_identity("org/name", memo) == identity
    assert checkpoint_identity("org/name", memo, revision="1111") == identity
    old = checkpoint_identity("org/name", memo, revision="old")
    assert old != identity
    (hub / "models--org--name" / "refs" / "main").write_text("2222")
    assert checkpoint_identity("org/name", memo) == old


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "gone"), ("s3://org/name", None)])
def test_an_id_that_was_never_fetched_is_an_error(hub: Path, name: str, revision: str | None, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weight files in .*models--"):
        checkpoint_identity(name, tmp_path / "memo.json", revision=revision)


def test_weights_in_a_folder_for_downloads_come_first(hub: Path, checkpoint: Path, tmp_path: Path) -> None:
    """SGLang fetches them there, and the configuration to the hub's own cache."""
    memo, downloads = tmp_path / "memo.json", tmp_path / "downloads"
    identity = checkpoint_identity("org/name", memo)
    assert checkpoint_identity("org/name", memo, cache=str(downloads)) == identity
    flip_one_bit_of_the_weights(checkpoint)
    fill(downloads, checkpoint, "main", "1111", only="*.safetensors")
    found = checkpoint_identity("org/name", memo, cache=str(downloads))
    assert found == checkpoint_identity(str(checkpoint), memo) != identity
