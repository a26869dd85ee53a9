"""Text as it comes: whole characters, no stop string, and in the end exactly what decoding at once gives."""

import pytest
import torch
import transformers

from airllm_nb.notebook.streaming import TextStream


@pytest.fixture(scope="module")
def tokenizer(chat):
    return transformers.AutoTokenizer.from_pretrained(chat)


def stream(tokenizer, ids, stop=()):
    """Feed ids one by one as `generate` does; returns the stream and the pieces it wrote."""
    pieces = []
    text = TextStream(tokenizer, pieces.append, stop)
    text.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for number in ids:
        text.put(torch.tensor([number]))
        if text.stopped:
            break
    text.end()
    text.end()
    assert "".join(pieces) == text.text
    return text, pieces


def encode(text):
    return list(text.encode())  # the test tokenizer's token i is byte i


def test_letters_come_one_by_one_and_characters_whole(tokenizer):
    text, pieces = stream(tokenizer, encode("aé€😀\n z"))
    assert pieces == ["a", "é", "€", "😀", "\n", " ", "z"]
    assert text.ids == encode("aé€😀\n z")


def test_bytes_that_are_no_text_come_out_as_decoding_gives_them(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(0, 259, (60,), generator=generator).tolist()
        expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert stream(tokenizer, ids)[0].text == expected


def test_an_unfinished_character_is_shown_at_the_end(tokenizer):
    assert stream(tokenizer, encode("a€")[:-1])[0].text == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["four", "wo t"], "one t"),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("User: hi", ["\nUser:"], "User: hi"),
        ("hi\nUse it", ["\nUser:"], "hi\nUse it"),
        ("hi\nUser", ["\nUser:"], "hi\nUser"),  # only the beginning of a stop string: shown when nothing follows
        ("né€", ["€"], "né"),
    ],
)
def test_stop_strings_in_pieces(tokenizer, text, stop, shown):
    result, _ = stream(tokenizer, encode(text), stop)
    assert result.text == shown
    assert result.stopped == (shown != text)


def test_what_may_begin_a_stop_string_waits(tokenizer):
    _, pieces = stream(tokenizer, encode("hi\nUse it"), ["\nUser:"])
    assert pieces == ["h", "i", "\nUse ", "i", "t"]


def test_a_stop_string_inside_one_token():
    """The text goes up to the middle of the token."""

    class Words:
        def decode(self, ids, **_):
            return "".join(("Hello", " wor", "ld! And")[number] for number in ids)

    assert stream(Words(), [0, 1, 2], ["ld!"])[0].text == "Hello wor"
    assert stream(Words(), [0, 1, 2], ["! A"])[0].text == "Hello world"
