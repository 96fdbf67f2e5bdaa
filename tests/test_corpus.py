"""A user's own text takes one changed line; text that cannot be read is refused with the value and the remedy."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from glasklar.corpus import REMOVED, Corpus, packed_order, prepare, select, split_documents, training_documents
from glasklar.data import documents
from glasklar.data.documents import Document
from glasklar.errors import CheckpointError, GlasklarError
from glasklar.provenance.hashing import merkle_root
from glasklar.recipe import Recipe, load_recipe, recipe_path

STDLIB_LINE = 'sources = [{ kind = "stdlib" }]'
SYLLABLES = ("ka", "lo", "mi", "ter", "sun", "über", "ße", "λο", "and", "tion", "pre", "ve", "na", "ï", "qu", "ru")


def notes(folder: Path, files: int = 60) -> Path:
    """A folder of small texts of made-up words (enough of them for 2,048 pieces), a third of them below a subfolder."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 5))) for _ in range(4000)]
    for i in range(files):
        path = folder / ("deep/er" if i % 3 == 0 else ".") / f"note{i:02d}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# Note {i}\n" + " ".join(draw.choices(words, k=400)), encoding="utf-8")
    return folder


def changed(tmp_path: Path, line: str) -> Recipe:
    """The built-in recipe with its one line of sources replaced, as a user would do it."""
    text = recipe_path("stdlib").read_text(encoding="utf-8")
    assert text.count(STDLIB_LINE) == 1
    mine = tmp_path / "mine.toml"
    mine.write_text(text.replace(STDLIB_LINE, line), encoding="utf-8")
    return load_recipe(str(mine))


def text_source(folder: Path, globs: str = '"*.md"') -> str:
    return f"sources = [{{ kind = 'text', path = '{folder}', globs = [{globs}], licence = 'mine' }}]"


def jsonl_source(path: Path) -> str:
    return f"sources = [{{ kind = 'jsonl', path = '{path}' }}]"


def corpus_of(tmp_path: Path, line: str) -> Corpus:
    return prepare(changed(tmp_path, line), tmp_path / "corpus")


def test_a_folder_takes_one_changed_line(tmp_path: Path) -> None:
    folder = notes(tmp_path / "notes")
    corpus = corpus_of(tmp_path, text_source(folder))
    written = {path.read_text(encoding="utf-8") for path in folder.rglob("*.md")}
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    train, kept_out = split_documents(recipe)
    assert {document.text for document in train + kept_out} == written
    assert not {document.text for document in train} & {document.text for document in kept_out}
    [source] = {document.source for document in train}
    root = merkle_root(document.hash for document in train)
    assert corpus.facts["root"] == root
    assert corpus.facts["source_roots"] == {source: {"documents": len(train), "licence": "mine", "root": root}}
    assert corpus.facts["licences"] == ["mine"]


def test_packed_tokens_are_the_documents(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, text_source(notes(tmp_path / "notes")))
    train = packed_order(split_documents(load_recipe(str(tmp_path / "mine.toml")))[0])
    starts = [*corpus.train.starts, len(corpus.train.ids)]
    for number, document in enumerate(train):
        ids = corpus.train.ids[starts[number] : starts[number + 1]].tolist()
        assert (ids[0], ids[-1]) == (corpus.tokenizer.bos_id, corpus.tokenizer.eos_id)
        assert corpus.tokenizer.decode(ids[1:-1]) == document.text


def test_json_lines_give_the_same_documents_as_files(tmp_path: Path) -> None:
    folder = notes(tmp_path / "notes")
    texts = sorted(path.read_text(encoding="utf-8") for path in folder.rglob("*.md"))
    lines = tmp_path / "notes.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    train, kept_out = split_documents(changed(tmp_path, jsonl_source(lines)))
    assert sorted(document.text for document in train + kept_out) == texts


CLEANING = "[cleaning]\nevaluations = ['{exam}']\n"


def messy(tmp_path: Path) -> Recipe:
    """A folder of notes, some of them nearly twice, one equal to another, one with a question of an exam; and JSON
    lines that repeat a note."""
    folder = notes(tmp_path / "notes")
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.md"))}
    for i in range(5):
        (folder / f"near{i}.md").write_text(texts[f"note{i:02d}.md"] + " and a few words more", encoding="utf-8")
    (folder / "same.md").write_text(texts["note20.md"], encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": texts["note21.md"].upper()}), encoding="utf-8")
    question = " ".join(texts["note30.md"].split()[100:120])
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": question, "choices": ["a", "b"]}), encoding="utf-8")
    line = text_source(folder).replace("}]", f"}}, {{ kind = 'jsonl', path = '{tmp_path / 'lines.jsonl'}' }}]")
    recipe = changed(tmp_path, line)
    mine = tmp_path / "mine.toml"
    mine.write_text(mine.read_text(encoding="utf-8") + CLEANING.format(exam=tmp_path / "exam.jsonl"), encoding="utf-8")
    assert load_recipe(str(mine)).hash != recipe.hash
    return load_recipe(str(mine))


def test_what_is_removed_is_listed_with_its_reason(tmp_path: Path) -> None:
    recipe = messy(tmp_path)
    corpus = prepare(recipe, tmp_path / "corpus")
    lines = [json.loads(line) for line in (tmp_path / "corpus" / REMOVED).read_text(encoding="utf-8").splitlines()]
    assert corpus.facts["removed"] == {"duplicate": 1, "near-duplicate": 6, "evaluation overlap": 1}
    assert [line["document"] for line in lines] == sorted(line["document"] for line in lines)
    by_reason = {
        reason: {line["origin"] for line in lines if line["reason"] == reason} for reason in corpus.facts["removed"]
    }
    assert by_reason["duplicate"] == {"same.md"}
    assert by_reason["evaluation overlap"] == {"deep/er/note30.md"}
    stay = {document.hash.hex() for document in [*select(recipe).train, *select(recipe).held_out]}
    assert all(line["because_of"] in stay for line in lines if line["reason"] == "near-duplicate")
    assert not {line["document"] for line in lines} & stay
    assert len(stay) + len(lines) == 60 + 5 + 1 + 1


def test_workers_and_orders_of_files_give_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = messy(tmp_path)
    wanted = prepare(recipe, tmp_path / "corpus")
    inside = documents._files
    for seed, workers in ((1, 1), (2, 2), (3, 5)):
        files = lambda folder: random.Random(seed).sample(found := list(inside(folder)), len(found))  # noqa: B023, E731
        monkeypatch.setattr(documents, "_files", files)
        again = prepare(recipe, tmp_path / f"corpus{seed}", workers)
        assert again.facts == wanted.facts
        assert {p.name: p.read_bytes() for p in (tmp_path / f"corpus{seed}").iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir()
        }


def test_a_prepared_corpus_knows_its_documents_again(tmp_path: Path) -> None:
    recipe = messy(tmp_path)
    made = prepare(recipe, tmp_path / "corpus")
    again = prepare(recipe, tmp_path / "corpus")
    assert again.held_out == made.held_out
    assert training_documents(recipe, tmp_path / "corpus") == packed_order(select(recipe).train)
    listed = tmp_path / "corpus" / REMOVED
    listed.write_bytes(listed.read_bytes().replace(b"duplicate", b"DUPLICATE", 1))
    with pytest.raises(CheckpointError, match=REMOVED):
        prepare(recipe, tmp_path / "corpus")


def test_the_very_same_document_in_two_sources_stays_once(tmp_path: Path) -> None:
    folder = notes(tmp_path / "notes")
    line = text_source(folder)
    changed(tmp_path, line.replace("}]", "}, " + line.partition("[")[2]))
    mine = tmp_path / "mine.toml"
    mine.write_text(mine.read_text(encoding="utf-8") + "[cleaning]\n", encoding="utf-8")
    recipe = load_recipe(str(mine))
    prepare(recipe, tmp_path / "corpus")
    assert len(training_documents(recipe, tmp_path / "corpus")) == len(select(recipe).train)
    everything: list[Document] = [*select(recipe).train, *select(recipe).held_out]
    assert len({document.hash for document in everything}) == len(everything) == 60


def test_a_repetition_in_one_source_may_stand_alone_in_another(tmp_path: Path) -> None:
    folder = notes(tmp_path / "notes")
    (folder / "note04.md").write_text((folder / "note05.md").read_text(encoding="utf-8"), encoding="utf-8")
    line = text_source(folder)
    recipe = changed(tmp_path, line.replace("}]", "}, " + text_source(folder, '"note05.md"').partition("[")[2]))
    corpus = prepare(recipe, tmp_path / "corpus")
    assert corpus.facts["removed"] == {"duplicate": 1}
    known = training_documents(recipe, tmp_path / "corpus")
    assert known == packed_order(select(recipe).train)
    assert {"note04.md", "note05.md"} < {document.origin for document in known}


def test_a_recipe_that_does_not_speak_of_cleaning_keeps_its_hash() -> None:
    assert "cleaning" not in load_recipe("spark").canonical()
    assert load_recipe("stdlib").cleaning is None


def missing(tmp_path: Path) -> tuple[str, list[str]]:
    return text_source(tmp_path / "nowhere"), ["nowhere", "does not exist", "absolute path"]


def empty(tmp_path: Path) -> tuple[str, list[str]]:
    (tmp_path / "hollow").mkdir()
    return text_source(tmp_path / "hollow"), ["hollow", "holds no text", "check path and globs"]


def blank(tmp_path: Path) -> tuple[str, list[str]]:
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.md").write_text(" \n")
    return text_source(tmp_path / "blank"), ["blank", "holds no text"]


def too_little(tmp_path: Path) -> tuple[str, list[str]]:
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "a.md").write_text("one line of text\n")
    return text_source(tmp_path / "little"), ["2048", "lower vocab_size, in [model] and [tokenizer], or add documents"]


def unmatched(tmp_path: Path) -> tuple[str, list[str]]:
    return text_source(notes(tmp_path / "notes"), '"*.rst"'), ["*.rst", "holds no text", "globs"]


def latin(tmp_path: Path) -> tuple[str, list[str]]:
    (notes(tmp_path / "notes") / "old.md").write_bytes("Straße".encode("latin-1"))
    return text_source(tmp_path / "notes"), ["old.md", "not UTF-8 at byte 4", "convert the file"]


def broken_line(tmp_path: Path) -> tuple[str, list[str]]:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    return jsonl_source(tmp_path / "a.jsonl"), ["a.jsonl", "line 2", "is no JSON"]


def other_field(tmp_path: Path) -> tuple[str, list[str]]:
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    return jsonl_source(tmp_path / "a.jsonl"), ["a.jsonl", "line 1", "'text'"]


def number_for_text(tmp_path: Path) -> tuple[str, list[str]]:
    (tmp_path / "a.jsonl").write_text('{"text": 7}\n')
    return jsonl_source(tmp_path / "a.jsonl"), ["line 1", "int, not text"]


BAD = [missing, empty, blank, too_little, unmatched, latin, broken_line, other_field, number_for_text]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_bad_sources_name_value_and_remedy(bad, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    line, wanted = bad(tmp_path)
    with pytest.raises(GlasklarError) as caught:
        corpus_of(tmp_path, line)
    for part in wanted:
        assert part in str(caught.value)
    assert not (tmp_path / "corpus" / "facts.json").exists()
