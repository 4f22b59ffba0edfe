"""Labels: what looks the same is the same, and what cannot be seen is refused."""

import unicodedata

import pytest

from model.labels import MAX_LABEL, LabelError, cleaned_label, normalized_label


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "007",
        "Zoë Ångström",
        "dock 4/b",
        "../gallery?person_id=x",
        "山田 太郎",
        "می\u200cخواهم",  # a non-joiner that Persian spelling needs
        "ක්\u200dරි",  # a joiner that Sinhala spelling needs
        "র\u200d্যাচেল",  # and Bengali, before the virama
        "नमस्ते",
        "عثمان",
        "👮🏽",
    ],
)
def test_what_people_write_is_a_label(text: str) -> None:
    assert normalized_label(text) == unicodedata.normalize("NFC", text)
    assert cleaned_label(text) == normalized_label(text)


def test_both_forms_of_a_name_are_one_label() -> None:
    assert normalized_label("zoe\u0308") == normalized_label("zo\u00eb") == "zo\u00eb"
    assert normalized_label("\u212bke") == "\u00c5ke"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " zoë",
        "zoë\t",
        "zoë\u00a0",
        "zo\u00a0ë",
        "zo\u200bë",
        "zo\u200dë",  # no spelling of Latin letters needs it
        "zoë\u200c",
        "\u200dzoë",
        "zo\u00adë",
        "\ufeffzoë",
        "zoë\ufe0f",
        "\u202ezoë",
        "عث\u200dمان",  # joined without it too
        "ක\u200dරි",
        "山田\u3000太郎",
        "zo\u2065ë",
        "zo\U000e0020ë",
        "zo\U00013430ë",
        "zo\x00ë",
        "zo\në",
        "\u3164",
        "\u0308oz",
        "zo\ud800",
        "zo\uffff",
        "z" * (MAX_LABEL + 1),
    ],
)
def test_what_cannot_be_seen_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(LabelError, match="label"):
        normalized_label(text)


def test_a_refusal_shows_what_was_not_seen() -> None:
    with pytest.raises(LabelError, match=r"U\+200B \(ZERO WIDTH SPACE\)") as refusal:
        normalized_label("zo\u200bë")
    assert str(refusal.value).isascii()
    assert "zo" not in str(refusal.value)  # a message may be logged; a name may not


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" zoe\u0308 ", "zoë"),
        ("zo\u200bë", "zoë"),
        ("zo\u00a0ë", "zo ë"),
        ("zoë\ufe0f\u2060", "zoë"),
        ("\u200b\u0308zoe\u200b\u0308", "zoë"),
        ("می\u200c\u200cخواهم\u200c", "می\u200cخواهم"),
        ("\u200b\u3164", None),
        ("z" * (MAX_LABEL + 1), None),
    ],
)
def test_old_texts_become_the_label_they_look_like(text: str, label: str | None) -> None:
    assert cleaned_label(text) == label
