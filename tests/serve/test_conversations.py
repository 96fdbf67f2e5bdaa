"""Conversations: a tree that loses nothing, apart for each owner, also when the server dies in the middle."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from glasklar.errors import CapacityError, RequestError
from glasklar.serve import conversations
from glasklar.serve.conversations import Conversations, Entry, NotFoundError, Store
from glasklar.serve.jobs import AskSettings, messages


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "one.sqlite")


def asked(store: Store, conversation: str, content: str, parent: str | None = None) -> tuple[Entry, Entry]:
    question = Entry(role="user", content=content, parent=parent)
    answer = Entry(role="assistant", content=f"re: {content}", parent=question.id, trail={"ids": [1, 2]})
    store.add(conversation, question, answer)
    return question, answer


def test_branches_add_and_take_nothing_away(store: Store) -> None:
    name = store.create("a  title\nin two lines")
    first, answer = asked(store, name, "one")
    _, deeper = asked(store, name, "two", answer.id)
    other, _ = asked(store, name, "other")
    assert [entry.content for entry in store.branch(name, deeper.id)] == ["one", "re: one", "two", "re: two"]
    assert [entry.parent for entry in store.messages(name)][:2] == [None, first.id]
    assert other.id in {entry.id for entry in store.messages(name)}
    assert store.head(name)["title"] == "a title in two lines"
    store.change(name, leaf=deeper.id, title="x" * 500)
    assert store.head(name)["leaf"] == deeper.id
    assert len(store.head(name)["title"]) == 200
    assert store.message(name, deeper.id).trail == {"ids": [1, 2]}


def test_search_finds_titles_and_texts_in_any_case(store: Store) -> None:
    bears, ants = store.create("Bären"), store.create("Ants")
    asked(store, ants, "they eat 100% of the_leaf")
    assert [one["id"] for one in store.all("BÄREN")] == [bears]
    assert [one["id"] for one in store.all("100% OF THE_")] == [ants]
    assert store.all("100%x") == []
    assert {one["id"] for one in store.all("")} == {bears, ants}


def test_what_is_unknown_is_said(store: Store) -> None:
    name, other = store.create("a"), store.create("b")
    _, answer = asked(store, name, "one")
    for act in (
        lambda: store.head("nothing"),
        lambda: store.message(other, answer.id),
        lambda: store.change(other, leaf=answer.id),
        lambda: store.add(other, Entry(role="user", parent=answer.id)),
        lambda: store.branch(other, answer.id),
        lambda: store.delete("nothing"),
    ):
        with pytest.raises(NotFoundError):
            act()
    assert store.messages(other) == []


def test_deleted_is_gone_from_the_disk(store: Store, tmp_path: Path) -> None:
    name = store.create("a")
    asked(store, name, "the-secret-word " * 50)
    store.delete(name)
    assert store.all() == []
    assert all(b"the-secret-word" not in path.read_bytes() for path in tmp_path.iterdir())


def test_an_answer_of_a_server_that_died_is_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "one.sqlite"
    dead = Store(path)
    name = dead.create("a")
    question = Entry(role="user", content="x")
    answer = Entry(role="assistant", parent=question.id, state="running")
    dead.add(name, question, answer)
    answer.content = "half of"
    dead.save(answer)
    found = Store(path).message(name, answer.id)
    assert (found.state, found.content) == ("interrupted", "half of")


def test_owners_have_files_of_their_own(tmp_path: Path) -> None:
    kept = Conversations(tmp_path / "kept")
    for owner in ("", "a", "../../b", "a" * 1000, "é\x00"):
        kept.of(owner).create(f"of {owner!r}")
    for owner in ("", "a", "../../b"):
        assert [one["title"] for one in kept.of(owner).all()] == [f"of {owner!r}"]
    files = list((tmp_path / "kept").glob("*.sqlite"))
    assert len(files) == 5
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    kept.close()


def test_many_threads_lose_nothing(store: Store) -> None:
    name = store.create("a")
    threads = [
        threading.Thread(target=lambda k=k: [asked(store, name, f"{k}.{i}") for i in range(10)]) for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.messages(name)) == 160


def test_limits_and_other_versions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name = store.create("a")
    asked(store, name, "x")
    monkeypatch.setattr(conversations, "MOST_MESSAGES", 2)
    with pytest.raises(RequestError, match="2 messages"):
        asked(store, name, "y")
    assert len(store.messages(name)) == 2
    monkeypatch.setattr(conversations, "MOST_CONVERSATIONS", 1)
    with pytest.raises(RequestError, match="delete some"):
        store.create("b")
    store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(CapacityError, match="99"):
        Store(store.path)


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "one.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(CapacityError, match=r"one\.sqlite.*move"):
        Store(path)


def test_without_a_folder_they_end_with_the_server() -> None:
    kept = Conversations()
    kept.of("a").create("x")
    folder = kept.of("a").path.parent
    kept.close()
    assert not folder.exists()


def test_what_the_model_is_told() -> None:
    file = {"name": "n.txt", "text": "words"}
    said = [
        Entry(role="user", content="one", files=[file]),
        Entry(role="assistant", content="", state="failed"),
        Entry(role="assistant", content="two", reasoning="hm"),
        Entry(role="user", content="three"),
    ]
    told = messages(said, AskSettings(system="be brief"), single_turn=False)
    assert [(m.role, m.content) for m in told] == [
        ("system", "be brief"), ("user", "n.txt:\n```\nwords\n```\n\none"), ("assistant", "two"), ("user", "three"),
    ]  # fmt: skip
    assert [m.content for m in messages(said, AskSettings(), single_turn=True)] == ["three"]
    with pytest.raises(RequestError, match="question"):
        messages(said[:3], AskSettings(), single_turn=False)
