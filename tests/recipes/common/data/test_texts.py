"""Texts and windows: clean, disjoint, reproducible; short or missing ones are told with their numbers."""

import hashlib
import json
import re
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_base
from transformers import AutoTokenizer

from recipes.common.data import texts as data
from recipes.common.data.base_models import resolve_model
from recipes.common.data.texts import (
    Text,
    calibration_windows,
    chat_of,
    evaluation_windows,
    load_text,
    sentences,
    tokenize,
)
from recipes.common.data.wikitext import prose
from zoo.errors import UserError


class Numbers:
    """A tokenizer whose text is numbers: token i of the text is the i-th number, so a window shows where it starts."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + [int(word) for word in text.split()]}


def counting(length: int) -> Text:
    return Text("counting", "1", "", 0, None, " ".join(map(str, range(length))))


# -------------------------------------------------------------------------------------------------------------- windows


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_calibration_windows_are_runs_of_the_text_that_do_not_overlap(draw):
    seqlen = draw.draw(st.integers(2, 9))
    nsamples = draw.draw(st.integers(1, 12))
    length = nsamples * seqlen + draw.draw(st.integers(0, 40))
    seed = draw.draw(st.integers(0, 5))
    windows = calibration_windows(counting(length), Numbers(), nsamples, seqlen, seed)
    assert windows.shape == (nsamples, seqlen) and windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all()
    assert windows.flatten().unique().numel() == nsamples * seqlen
    assert torch.equal(windows, calibration_windows(counting(length), Numbers(), nsamples, seqlen, seed))


def test_calibration_starts_are_random_and_reach_the_whole_text():
    starts = [calibration_windows(counting(1000), Numbers(), 10, 16, seed)[:, 0] for seed in range(40)]
    assert len({tuple(s.tolist()) for s in starts}) == 40
    every = torch.cat(starts)
    assert every.min() < 50 and every.max() > 930
    assert len(set((every % 16).tolist())) >= 6  # not always the same grid
    assert any((s.diff() < 0).any() for s in starts)  # in random order


def test_evaluation_windows_are_spread_evenly_and_always_the_same():
    windows = evaluation_windows(counting(1003), Numbers(), 10, 5)
    assert windows[:, 0].tolist() == [0, 250, 500, 740, 990]
    assert (windows.diff(dim=1) == 1).all()
    assert evaluation_windows(counting(1003), Numbers(), 10, 10_000)[:, 0].tolist() == list(range(0, 1000, 10))


def test_evaluation_windows_begin_as_the_tokenizer_begins_texts():
    plain, begun = (evaluation_windows(counting(1003), Numbers(bos), 10, 5) for bos in (None, 7777))
    assert (begun[:, 0] == 7777).all() and torch.equal(begun[:, 1:], plain)


def test_a_text_that_is_too_short_is_refused_with_numbers():
    with pytest.raises(UserError, match=r"1,279 tokens give 19 windows of 64, 20 are needed; lower --nsamples"):
        calibration_windows(counting(1279), Numbers(), 20, 64, 0)
    assert len(calibration_windows(counting(1280), Numbers(), 20, 64, 0)) == 20
    with pytest.raises(UserError, match="63 tokens are fewer than one window of 64"):
        evaluation_windows(counting(63), Numbers(), 64, 1)


@pytest.mark.parametrize(("count", "seqlen"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_impossible_numbers_are_refused(count, seqlen):
    with pytest.raises(UserError, match=f"--nsamples {count} --seqlen {seqlen}"):
        calibration_windows(counting(100), Numbers(), count, seqlen, 0)
    with pytest.raises(UserError, match=f"--eval-windows {count} --eval-seqlen {seqlen}"):
        evaluation_windows(counting(100), Numbers(), seqlen, count)


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sha256", "size", "tokens"),
    [
        ("wikipedia", "48ae2823b65be145691cf2a6a85d1059197b2691a2787ec8164d197e8417064a", 2_552_481, 557_946),
        ("A", "5d7844a875b2c924e1537830a425a26c5d3fc7265e597f2a64eb3360d82544dd", 1_607_331, 348_780),
        ("B", "105cccfb8cd37c10714a88df574f498931b7fed691581c00befe8227070a2ce8", 1_829_838, 383_032),
    ],
)
def test_packaged_texts_are_pinned(name, sha256, size, tokens):
    text = load_text(name)
    assert (text.sha256, text.size) == (sha256, size)
    assert hashlib.sha256(text.text.encode()).hexdigest() == sha256
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct").path)
    ids = tokenize(text, tokenizer)
    assert ids.shape == (tokens,) and not (ids <= 2).any()  # 0, 1, 2: unknown, begin, end
    assert tokenizer.decode(ids[:2000]) == text.text[: len(tokenizer.decode(ids[:2000]))]


def test_no_sentence_is_calibrated_on_and_held_out():
    texts = {name: sentences(load_text(name).text) for name in ("wikipedia", "A", "B", "C")}
    assert min(map(len, texts.values())) > 3000
    for first, second in (
        ("wikipedia", "A"),
        ("wikipedia", "B"),
        ("wikipedia", "C"),
        ("A", "B"),
        ("A", "C"),
        ("B", "C"),
    ):
        assert texts[first].isdisjoint(texts[second]), (first, second)


def test_sentences_would_notice_an_overlap():
    shared = "Executive power is exercised by the government."
    assert sentences(f"One. {shared} Two.") & sentences(f"Other text!\n\n{shared}") == {shared}
    assert shared in sentences(load_text("A").text)  # it is in an article of the dump as well, and was taken out there
    assert shared not in load_text("wikipedia").text


@pytest.mark.slow
def test_texts_hold_whole_clean_documents():
    squad = load_text("A").text.split("\n\n")
    assert len(squad) == len(set(squad)) and squad[0].startswith("Super Bowl 50 was an American football game")
    addresses = load_text("B").text  # from 1980 on
    assert addresses.startswith(
        "To the Congress of the United States:\n\nMy State of the Union Address will be devoted"
    )
    wikipedia = load_text("wikipedia").text
    assert wikipedia.startswith("Anarchism is a political philosophy that advocates self-governed societies")
    markup = re.findall(r"\[\[|\]\]|\{\{cite|<ref|</|''|\|thumb|&nbsp;|https?:|^\s*[*#|]", wikipedia, re.M)
    assert len(markup) == 0, markup


def test_wiki_markup_becomes_prose():
    wikitext = """{{Infobox|name = X {{nested|{{deeper}}}}|image = [[File:x.jpg]]}}
[[File:Map.png|thumb|A caption with a [[link|label]] and {{convert|5|km|mi}} in it that is rather long for a caption]]
'''Ada''' ({{lang-el|λόγος}}; {{IPA|x}}) is a ''[[X y|language]]''{{cn}} for large programs of [[ministries]] and armies.
It<ref name="a" /> is named after [[Ada Lovelace]]&nbsp;&ndash; see ''Iliad'''s text, {{convert|120|km}}<!-- -->.<ref>A
note.</ref> And one more.<ref name="b">{{cite web|url=http://x.org|title=[[Y]]}}</ref>

{| class="wikitable"
! head || other
|-
| this cell of the table holds a [[link]] and enough characters to be a line || {{flag|X}}
|}
* this item of a list is long enough to pass for a paragraph if its star is overlooked
== Design ==
The language has packages [http://x.org with a label] and tasks <math>a < b</math> which run side by side<br/>always.
=== See also ===
This line stands under back matter and has to go, although it is long enough to be kept.
== Notes ==
So does this one, which stands under notes, although it is also long enough to be kept.
== History ==
The history section comes after the notes and is prose again, so it has to be in the text.
[[Category:Languages]]
"""
    assert prose(wikitext).split("\n\n") == [
        "Ada (λόγος) is a language for large programs of ministries and armies.",
        "It is named after Ada Lovelace – see Iliad's text, 120 km. And one more.",
        "The language has packages with a label and tasks which run side by side always.",
        "The history section comes after the notes and is prose again, so it has to be in the text.",
    ]


# ------------------------------------------------------------------------------------------------------- files and Hub


def test_a_text_file_and_a_jsonl_file_hold_the_same_documents(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße.\n\nSecond.", encoding="utf-8")
    lines = [json.dumps({"body": "Grüße."}), "", json.dumps({"body": "Second.", "other": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    plain, rows = load_text(str(tmp_path / "a.txt")), load_text(str(tmp_path / "a.jsonl"), column="body")
    assert plain.text == rows.text == "Grüße.\n\nSecond."
    assert plain.size == len("Grüße.\n\nSecond.".encode()) and plain.sha256 == rows.sha256
    assert (plain.name, plain.license) == ("a.txt", None)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("a.txt", b"", "the text is empty"),
        ("a.txt", b" \n\n ", "the text is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", None, "No such file"),
        ("a.jsonl", b"", "the text is empty"),
        ("a.jsonl", b'{"text": "x"}\nnonsense', "line 2 is no JSON object with a text in 'text'"),
        ("a.jsonl", b'{"body": "x"}', "line 1 is no JSON object with a text in 'text'"),
        ("a.jsonl", b'{"text": 5}', "line 1 is no JSON object with a text in 'text'"),
        ("a.jsonl", b"[1, 2]", "line 1 is no JSON object"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, file, content, says):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_text(str(tmp_path / file))
    assert "--calibration" in str(caught.value)


@pytest.fixture
def hub_rows(monkeypatch):
    """A Hub data set of endless rows; the value of the fixture is the list of load_dataset's arguments."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"text": f"row {i} " + "x" * 992, "id": i} for i in range(10**9))

    card = SimpleNamespace(get=lambda key: {"license": "odc-by"}[key])
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: SimpleNamespace(sha="c0ffee", card_data=card))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "ROW_CHARACTERS", 10_000)
    return calls


def test_a_hub_data_set_is_streamed_at_its_commit_and_no_further_than_needed(hub_rows):
    text = load_text("org/corpus", config="en", split="validation")
    assert hub_rows == [(("org/corpus", "en"), {"split": "validation", "revision": "c0ffee", "streaming": True})]
    assert 10_000 < text.size < 11_100 and text.text.count("\n\n") == text.text.count("row ") - 1
    assert (text.name, text.version, text.license) == ("org/corpus", "c0ffee en/validation", "odc-by")


def test_a_missing_column_of_a_hub_data_set_names_those_there_are(hub_rows):
    with pytest.raises(UserError, match="--calibration-column body: org/corpus has text, id"):
        load_text("org/corpus", column="body")


def test_an_unknown_name_is_told_with_the_ways_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--calibration wikipedai: not one of wikipedia, A, B, C") as caught:
        load_text("wikipedai")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- other files, rows and chats

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf"  # Python's splitlines splits at every one of these


def test_only_a_newline_ends_a_line_of_jsonl(tmp_path):
    lines = [json.dumps({"text": ODD}, ensure_ascii=False), json.dumps({"text": "Second."}, ensure_ascii=False)]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    assert load_text(str(tmp_path / "a.jsonl")).text == ODD + "\n\nSecond."


def test_a_byte_order_mark_is_none_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffGrüße.", encoding="utf-8")
    (tmp_path / "A.TXT").write_text("Grüße.", encoding="utf-8")
    (tmp_path / "A.JSONL").write_text("\ufeff" + json.dumps({"text": "Grüße."}) + "\n", encoding="utf-8")
    assert {load_text(str(tmp_path / name)).text for name in ("a.txt", "A.TXT", "A.JSONL")} == {"Grüße."}


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok \\ud83d\\ude00 cut \\ud83d"}', encoding="utf-8")
    text = load_text(str(tmp_path / "a.jsonl"))
    assert text.text == "ok 😀 cut \ufffd" and text.size == len(text.text.encode())


@pytest.mark.parametrize("content", [b"\0" * 4000, "Plain words, but in UTF-16. ".encode("utf-16-le") * 40])
def test_nuls_are_no_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="full of NUL characters"):
        load_text(str(tmp_path / "a.txt"))


@pytest.fixture
def tables(tmp_path):
    """The same two documents, and a row without one, in every kind of file."""
    rows = {"text": ["Grüße,\nzwei Zeilen.", None, ODD.replace("\x0c", "")], "id": [1, 2, 3]}
    table = datasets.Dataset.from_dict(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(
        json.dumps([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    )
    table.to_json(tmp_path / "lines.json")
    return tmp_path


def test_csv_json_and_parquet_hold_the_same_documents(tables, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tables / "cache")
    for name in ("a.csv", "a.json", "a.parquet", "lines.json"):
        text = load_text(str(tables / name))
        assert text.text == "Grüße,\nzwei Zeilen.\n\n" + ODD.replace("\x0c", ""), name
        assert (text.name, text.version) == (name, "file")
        with pytest.raises(UserError, match=f"--calibration-column body: .*{name} has text, id"):
            load_text(str(tables / name), column="body")
        with pytest.raises(UserError, match="--calibration-column id: it holds int, texts or chats are needed"):
            load_text(str(tables / name), column="id")
    assert not list((tables / "cache").rglob("*.arrow")), "rows are streamed, not converted"


def test_a_folder_is_read_as_datasets_reads_it(tables, tmp_path):
    for name in ("texts", "rows"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "one.txt").write_text("Line one.\nLine two.")
    (tmp_path / "texts" / "two.txt").write_text("Another text.")
    text = load_text(str(tmp_path / "texts"))
    assert text.text == "Line one.\nLine two.\n\nAnother text." and (text.name, text.version) == ("texts", "folder")
    (tables / "a.parquet").rename(tmp_path / "rows" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_dict({"text": ["held out"], "id": [9]}).to_parquet(tmp_path / "rows" / "test.parquet")
    assert (
        load_text(str(tmp_path / "rows")).text.startswith("Grüße")
        and "held out" not in load_text(str(tmp_path / "rows")).text
    )
    assert load_text(str(tmp_path / "rows"), split="test").text == "held out"
    with pytest.raises(UserError, match="no Hub data set that can be read"):
        load_text(str(tmp_path / "rows"), split="dev")


@pytest.mark.parametrize("name", ["empty", "pictures"])
def test_a_folder_without_texts_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    if name == "pictures":
        (tmp_path / name / "a.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=f"--calibration .*{name}: not one of wikipedia") as caught:
        load_text(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.parquet", b"nonsense"),
        ("a.json", b"{"),
        ("a.json", b"[1, 2]"),
        ("a.csv", b"\xff\xfe\x00\x01"),
        ("a.csv", b""),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="--calibration") as caught:
        load_text(str(tmp_path / file))
    assert "\n" not in str(caught.value)


CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]


def spoken(turns):
    return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


def test_chats_go_through_the_chat_template(tmp_path):
    datasets.Dataset.from_dict({"messages": [CHAT, CHAT[:1]]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in (CHAT, CHAT[:1])))
    for name in ("a.parquet", "a.jsonl"):
        text = load_text(str(tmp_path / name), column="messages", chat=spoken)
        assert text.text == "<user>Hello?<assistant>Hi.\n\n<user>Hello?"


def test_chats_of_a_hub_data_set_do_too(hub_rows, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [{"messages": CHAT}])
    assert load_text("org/chats", column="messages", chat=spoken).text == "<user>Hello?<assistant>Hi."


def test_the_template_is_the_tokenizers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_base(tmp_path / "base"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(UserError, match="chat template does not take the chats in messages") as caught:
        load_text(str(tmp_path / "a.jsonl"), column="messages", chat=chat_of(tokenizer))
    assert "\n" not in str(caught.value)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    text = load_text(str(tmp_path / "a.jsonl"), column="messages", chat=chat_of(tokenizer))
    assert text.text == "[user] Hello?[assistant] Hi."


@pytest.mark.parametrize(
    "turns", [["Hello?"], [{"from": "human", "value": "Hello?"}], [{"role": "user", "content": [{"type": "text"}]}], []]
)
def test_lists_that_are_no_chats_are_refused(tmp_path, turns):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match="a.jsonl: (line 1 is no JSON object|messages holds lists, but not of)"):
        load_text(str(tmp_path / "a.jsonl"), column="messages", chat=spoken)
