"""Calibration windows: where they start, what is refused, what the digest names."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from streamslr.calibration.tokens import calibration_windows, text_windows
from streamslr.errors import InputError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of one token a word: w0 … w999 are ids 0 … 999."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)} | {"<s>": 1000}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def words(first: int, count: int) -> str:
    return " ".join(f"w{first + i}" for i in range(count))


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts))
    return path


def test_text_windows_start_where_pythons_random_says(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The rule that other implementations are measured with: randint(0, tokens - T - 1), seeded."""
    text = tmp_path / "a.txt"
    text.write_text(words(0, 500))
    ids = calibration_windows(tokenizer, text, num_windows=4, seq_len=10, seed=7).ids
    draw = random.Random(7)
    starts = [draw.randint(0, 500 - 10 - 1) for _ in range(4)]
    assert ids.tolist() == [list(range(s, s + 10)) for s in starts]


def test_windows_of_jsonl_lie_within_one_long_document(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [words(100 * i, 60) for i in range(9)] + ["w1 w2"] * 50)
    ids = calibration_windows(tokenizer, path, num_windows=6, seq_len=20, seed=0).ids
    assert ids.shape == (6, 20)
    assert len({window[0].item() // 100 for window in ids}) == 6, "a document gives one window"
    assert all(torch.equal(w, torch.arange(w[0], w[0] + 20)) for w in ids)


def test_few_long_documents_give_several_windows_when_they_hold_enough(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [words(0, 300), words(500, 300)])
    ids = calibration_windows(tokenizer, path, num_windows=8, seq_len=50, seed=0).ids
    assert len({tuple(w.tolist()) for w in ids}) == 8


def test_gzip_reads_like_the_file_inside(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "a.jsonl", [words(100 * i, 60) for i in range(9)])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    text = tmp_path / "a.txt"
    text.write_text(words(0, 300))
    text_packed = tmp_path / "a.txt.gz"
    text_packed.write_bytes(gzip.compress(text.read_bytes()))
    for one, other in ((plain, packed), (text, text_packed)):
        windows = [calibration_windows(tokenizer, p, 3, 20, seed=1) for p in (one, other)]
        assert windows[0].digest == windows[1].digest


def test_the_digest_names_the_token_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(words(0, 500))
    same = [calibration_windows(tokenizer, text, 4, 10, seed).digest for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "w1 w2 w3", r"a.txt holds 3 tokens; 4 windows of 10 tokens need 40"),
        ("a.txt", "w1 " * 39, r"39 tokens"),
        (
            "a.jsonl",
            '{"text": "w1 w2"}\n' * 100,
            r"0 tokens in 0 documents of more than 10 tokens; 4 windows .* need 40",
        ),
        ("a.jsonl", '{"text": "w1"}\n{"body": 1}\n', r'line 2 is not a JSON object with a "text" field'),
        ("a.jsonl", '{"text": "w1"}\n{"te', r"line 2"),
        ("a.txt.gz", "not gzip", r"cannot be read"),
    ],
)
def test_unusable_text_is_refused_saying_why(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        calibration_windows(tokenizer, tmp_path / name, num_windows=4, seq_len=10, seed=0)


def test_a_missing_file_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.txt does not exist"):
        calibration_windows(tokenizer, tmp_path / "nowhere.txt", 4, 10, 0)


def test_evaluation_windows_follow_one_another(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(words(0, 47))
    assert text_windows(tokenizer, text, 10, None).flatten().tolist() == list(range(40))
    assert text_windows(tokenizer, text, 10, 2).shape == (2, 10)
    with pytest.raises(InputError, match="holds 47 tokens, less than one window of 48"):
        text_windows(tokenizer, text, 48, None)
