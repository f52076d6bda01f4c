"""hcache gc of pages that were not used for long, and of a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.cli.main import main
from sglang_hcache.page_hash import namespace_seed, page_hash
from sglang_hcache.startup.fingerprint import checkpoint_identity
from sglang_hcache.storage.index import Index
from tests.cli.stores import found, make, make_prefix, run
from tests.cli.test_export import said
from tests.storage.pages import FINGERPRINT, LAYOUT, OTHER_FINGERPRINT, keys_of, lease, open_store, segment_files

P = LAYOUT.page_tokens
SYSTEM = list(range(1000, 1000 + 3 * P))
ALICE = [*SYSTEM, *range(2000, 2000 + 2 * P)]  # whole pages, and each is followed by an answer
BOB = [*SYSTEM, *range(3000, 3000 + 2 * P)]
ANSWER = list(range(9000, 9000 + 6 * P))


class Bigrams(list[int]):
    is_bigram = True

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(tokens[:-1])
        self.token_ids = tokens


def keys(tokens: list[int], *, salt: str | None = None, extra_key: str | None = None) -> list[bytes]:
    hashes = page_hash(tokens, namespace_seed(extra_key, salt), P)
    return list(map(bytes.fromhex, hashes))


def conversations(*directories: Path, **namespace: Any) -> None:
    for prompt in (ALICE, BOB):
        make_prefix(*directories, keys=keys([*prompt, *ANSWER], **namespace))


def stored(directories: Sequence[Path], pages: list[bytes]) -> int:
    """How many there are; asserts that these are the first ones."""
    store = open_store(*directories)
    there = store.contains(pages)
    store.close()
    assert there == sorted(there, reverse=True)
    return sum(there)


def forget(directory: Path, pages: list[bytes]) -> None:
    index = Index(directory / "index", FINGERPRINT)
    index.delete_many(index.get_many(pages).items())
    index.close()


def use(directory: Path, pages: list[bytes], ago_s: int, fingerprint: bytes = FINGERPRINT) -> None:
    index = Index(directory / "index", fingerprint)
    index.touch(dict.fromkeys(pages, 0), now=int(time.time()) - ago_s)
    index.close()


@pytest.fixture
def erase(tmp_path: Path) -> list[object]:
    """The command for Alice's prompt; less than a page of it comes after those that have a key."""
    (tmp_path / "tokens").write_text(json.dumps([*ALICE, *ANSWER[:2]]))
    return ["gc", "--tokens", tmp_path / "tokens", "--dir"]


@pytest.mark.parametrize("directories", [1, 2])
def test_pages_that_were_not_used_for_long_go_also_of_a_busy_model(
    directories: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first ones stay where one that follows was used: the KV pool may have had them all the time."""
    paths = [tmp_path / str(i) for i in range(directories)]
    make(*paths)
    make(*paths, pages=range(100, 104), fingerprint=OTHER_FINGERPRINT)
    for path in paths:
        use(path, keys_of(range(10)), 3600)
        use(path, keys_of([4]), 60)
        use(path, keys_of(range(100, 104)), 3600, OTHER_FINGERPRINT)
    gc = ["gc", "--older-than", "10m", "--dir", ",".join(map(str, paths))]
    for options in (["--dry-run"], []):
        status, report = run(capsys, *gc, *options)
        assert (status, sum(one["pages"] for one in report["directories"])) == (0, 9)
    assert found(*paths) == list(range(5))
    assert found(*paths, pages=range(100, 104), fingerprint=OTHER_FINGERPRINT) == []


@pytest.mark.parametrize("directories", [1, 2])
def test_a_prompt_goes_with_all_that_follows_but_not_what_others_share(
    directories: int, erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / str(i) for i in range(directories)]
    conversations(*paths)
    every = ",".join(map(str, paths))
    for options in (["--dry-run"], []):
        status, report = run(capsys, *erase, every, *options)
        assert (status, sum(one["pages"] for one in report["directories"])) == (0, 8)
        assert sum(one["shared_pages"] for one in report["directories"]) == 3
        assert [one["in_use"] for one in report["directories"]] == [False] * directories
    assert stored(paths, keys([*ALICE, *ANSWER])) == 3
    assert stored(paths, keys([*BOB, *ANSWER])) == 11
    assert main([*map(str, erase), every]) == 0
    assert "of the prompt kept, as others follow, too: see --with-shared" in capsys.readouterr().out
    (tmp_path / "tokens").write_text(json.dumps(BOB))
    assert run(capsys, *erase, every)[0] == 0
    assert stored(paths, keys([*BOB, *ANSWER])) == 0, "nobody shares them any more"


def test_what_is_shared_goes_with_all_others(
    erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations(tmp_path)
    (one,) = run(capsys, *erase, tmp_path, "--with-shared")[1]["directories"]
    assert (one["pages"], one["shared_pages"]) == (19, 0)
    assert stored([tmp_path], keys([*BOB, *ANSWER])) == 0


def test_pages_are_not_shared_with_those_that_go_at_the_same_time(
    erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations(tmp_path)
    use(tmp_path, keys([*BOB, *ANSWER]), 3600)
    (one,) = run(capsys, *erase, tmp_path, "--older-than", "10m")[1]["directories"]
    assert (one["pages"], one["shared_pages"]) == (19, 0)


@pytest.mark.parametrize("lost", [3, 4])
def test_what_is_behind_a_page_that_was_evicted_goes_too(
    lost: int, erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations(tmp_path)
    forget(tmp_path, [keys(ALICE)[lost]])
    (one,) = run(capsys, *erase, tmp_path)[1]["directories"]
    assert (one["pages"], one["orphans"], one["shared_pages"]) == (7, 0, 3)
    assert stored([tmp_path], keys([*BOB, *ANSWER])) == 11


def test_a_prompt_with_a_draft_model(erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = page_hash(Bigrams([*ALICE, *ANSWER]), None, P)
    make_prefix(tmp_path, keys=list(map(bytes.fromhex, hashes[:-1])))
    assert run(capsys, *erase, tmp_path)[1]["directories"][0]["pages"] == 10


@pytest.mark.parametrize("namespace", [{"salt": "alice"}, {"extra_key": "k"}, {"salt": "é", "extra_key": "k"}])
def test_a_prompt_of_a_namespace(
    namespace: dict[str, str], erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_prefix(tmp_path, keys=keys([*ALICE, *ANSWER]))
    make_prefix(tmp_path, keys=keys([*ALICE, *ANSWER], **namespace))
    options = [part for name, value in namespace.items() for part in (f"--{name.replace('_', '-')}", value)]
    export = ["export", "--tokens", tmp_path / "tokens", "--out", tmp_path / "x", "--dir", tmp_path]
    assert run(capsys, *export, *options)[1]["pages"] == 5
    assert run(capsys, *erase, tmp_path, *options)[1]["directories"][0]["pages"] == 11
    assert stored([tmp_path], keys([*ALICE, *ANSWER], **namespace)) == 0
    assert stored([tmp_path], keys([*ALICE, *ANSWER])) == 11
    assert "nothing is stored of this prompt" in said(capsys, *export, *options)


@pytest.mark.parametrize("extra_key", ["", "k"])
def test_a_prompt_to_an_adapter(
    extra_key: str, erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the adapter's content, wherever that lies."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    pages = keys([*ALICE, *ANSWER], extra_key=extra_key + checkpoint_identity(str(adapter), tmp_path / "memo"))
    make_prefix(tmp_path, keys=pages)
    where = ["--extra-key", extra_key, "--lora"]
    assert "nowhere" in said(capsys, *erase, tmp_path, *where, tmp_path / "nowhere")
    assert run(capsys, *erase, tmp_path, *where, adapter)[1]["directories"][0]["pages"] == 11
    assert stored([tmp_path], pages) == 0


def test_of_a_prompt_in_use_copies_are_left(
    erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In memory, until it is emptied; they are not written again. In files, until a gc after the server's end."""
    conversations(tmp_path)
    server, prompt = open_store(tmp_path), keys([*ALICE, *ANSWER])
    assert len(lease(server, "reader", prompt)) == 11
    server.release("reader")
    assert main([*map(str, erase), str(tmp_path)]) == 0
    assert "in use; what servers have in memory, and files they are writing, are left" in capsys.readouterr().out
    assert run(capsys, *erase, tmp_path)[1]["directories"][0]["in_use"]
    assert server.contains(prompt) == [True] * 11
    assert server.flush(30)
    server.drop_host()
    assert server.contains(prompt) == [True] * 3 + [False] * 8
    server.close()
    assert run(capsys, "gc", "--dir", tmp_path)[0] == 0
    content = b"".join(file.read_bytes() for file in segment_files(tmp_path))
    assert [key in content for key in prompt] == [True] * 3 + [False] * 8


def test_a_model_that_is_not_listed_in_full_may_have_more_of_a_prompt(
    erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations(tmp_path)
    forget(tmp_path, [b""])  # its mark
    for options in (["--dry-run"], []):
        error = said(capsys, *erase, tmp_path, *options)
        assert f"{tmp_path} may have more of the prompt, which the index does not list" in error
    assert run(capsys, "gc", "--dir", tmp_path)[0] == 0
    assert run(capsys, "fsck", "--repair", "--dir", tmp_path)[0] == 0
    assert run(capsys, *erase, tmp_path)[1]["directories"][0]["pages"] == 8


def test_what_cannot_be_told_by_its_tokens_is_refused(
    erase: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations(tmp_path)
    (tmp_path / "tokens").write_text(json.dumps(ALICE[:P]))
    assert f"--tokens needs more than {P} tokens, which a page has" in said(capsys, *erase, tmp_path)
    assert "go with --tokens" in said(capsys, "gc", "--salt", "x", "--dir", tmp_path)
    assert "go with --tokens" in said(capsys, "export", "--all", "--salt", "x", "--out", "x", "--dir", tmp_path)
    assert "--with-shared goes with --tokens" in said(capsys, "gc", "--with-shared", "--dir", tmp_path)
    assert stored([tmp_path], keys([*ALICE, *ANSWER])) == stored([tmp_path], keys([*BOB, *ANSWER])) == 11
