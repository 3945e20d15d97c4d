"""Calibration windows: where they start, what is refused, what the digest names."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from streamslr.calibration.tokens import calibration_windows, text_windows, window_prefix
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


def spans_overlap(windows: torch.Tensor) -> bool:
    """Tell if two windows of a text whose tokens all differ share one."""
    return bool(len(windows.unique()) < windows.numel())


@pytest.fixture(params=["txt", "jsonl"])
def long_text(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A text, or ten documents, whose tokens all differ."""
    if request.param == "jsonl":
        return jsonl(tmp_path / "a.jsonl", [words(100 * i, 60) for i in range(10)])
    (tmp_path / "a.txt").write_text(words(0, 1000))
    return tmp_path / "a.txt"


def test_check_windows_share_no_text_and_change_no_calibration_window(
    tokenizer: PreTrainedTokenizerFast, long_text: Path
) -> None:
    without, few, many = (calibration_windows(tokenizer, long_text, 1, 25, 0, check=check) for check in (0, 2, 9))
    assert without.digest == few.digest == many.digest
    assert len(without.check) == 0
    assert many.overlapping == 0
    assert not spans_overlap(torch.cat([many.ids, many.check]))


def test_held_out_windows_stand_behind_the_others_and_share_no_text(
    tokenizer: PreTrainedTokenizerFast, long_text: Path
) -> None:
    without, drawn = (calibration_windows(tokenizer, long_text, 2, 25, 0, held_out=n, check=3) for n in (0, 4))
    assert torch.equal(drawn.ids[:2], without.ids)
    assert (drawn.ids.shape, drawn.check.shape) == ((6, 25), (3, 25))
    assert drawn.held_out_overlapping == 0
    assert not spans_overlap(torch.cat([drawn.ids, drawn.check]))


def test_windows_apart_without_room_are_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(words(0, 30))
    drawn = calibration_windows(tokenizer, text, 1, 20, 0, held_out=2, check=3)
    assert drawn.check.shape == (3, 20)
    assert (drawn.held_out_overlapping, drawn.overlapping) == (2, 3)


def test_check_windows_begin_with_the_same_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(words(0, 500))
    assert calibration_windows(tokenizer, text, 4, 10, 0, [1000], check=2).check[:, 0].tolist() == [1000, 1000]


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
    ],
)
def test_unusable_text_is_refused_saying_why(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        calibration_windows(tokenizer, tmp_path / name, num_windows=4, seq_len=10, seed=0)


def test_evaluation_windows_follow_one_another(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(words(0, 47))
    assert text_windows(tokenizer, text, 10, None).flatten().tolist() == list(range(40))
    assert text_windows(tokenizer, text, 10, 2).shape == (2, 10)
    with pytest.raises(InputError, match="holds 47 tokens, less than one window of 48"):
        text_windows(tokenizer, text, 48, None)


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Tokenizer of the same words that puts BOS (1000) before each text by itself, as Llama 3's and Gemma's do."""
    words = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1000)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def test_windows_begin_with_bos_where_the_tokenizer_adds_it_or_the_user_asks(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    choices = ("auto", "yes", "no")
    assert [window_prefix(tokenizer, bos) for bos in choices] == [[], [1000], []]
    assert [window_prefix(bos_tokenizer, bos) for bos in choices] == [[1000], [1000], []]


def test_bos_that_the_tokenizer_lacks_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert window_prefix(without, "auto") == []
    with pytest.raises(InputError, match="tokenizer has no BOS token"):
        window_prefix(without, "yes")


def test_bos_takes_the_place_of_one_token_of_text(bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(words(0, 47))
    consecutive = text_windows(bos_tokenizer, text, 10, None, [1000])
    assert consecutive[:, 0].tolist() == [1000] * 5
    assert consecutive[:, 1:].flatten().tolist() == list(range(45))
    drawn = calibration_windows(bos_tokenizer, text, 4, 10, 0, [1000]).ids
    assert drawn.shape == (4, 10)
    assert all(row[0] == 1000 and torch.equal(row[1:], torch.arange(row[1], row[1] + 9)) for row in drawn)
    documents = jsonl(tmp_path / "a.jsonl", [words(100 * i, 10) for i in range(4)])
    assert calibration_windows(bos_tokenizer, documents, 4, 10, 0, [1000]).ids[:, 0].tolist() == [1000] * 4
