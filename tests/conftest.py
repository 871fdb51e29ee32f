"""What tests of the trainer share: a few kB of text as token shards, and for each test a folder and one thread."""

import contextlib
import io
import random
from pathlib import Path

import pytest
import torch

import prepare_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of a tiny data set: 400 documents of a few words, as bytes, in three training shards and one other."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = "the a fox owl bear sings runs sleeps and then under over moon tree river red blue".split()
    documents = [" ".join(draw.choices(words, k=draw.randint(2, 12))) + "." for _ in range(400)]
    Path(folder, "text.txt").write_text(f"\n{prepare_data.SEPARATOR}\n".join(documents), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "SHARD_TOKENS", 6000)
        prepare_data.main([str(folder / "text.txt"), "--out", str(folder / "shards"), "--tokenizer", "bytes"])
    return str(folder / "shards")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with one thread: these matrices are too small for more."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
