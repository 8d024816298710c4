"""What a run says of the code that it is made of."""

import subprocess
from pathlib import Path

import pytest

from experiments.runs import source as of_source
from experiments.runs.source import code_digest, compiler, source


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with a commit, and in it a folder `code` of two files."""
    (tmp_path / "code").mkdir()
    for name in ("a.py", "b.h"):
        (tmp_path / "code" / name).write_text("before\n")
    (tmp_path / ".gitignore").write_text("ignored/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_tree_as_committed_is_told_by_its_commit_alone(repository: Path) -> None:
    (repository / "notes.txt").write_text("no source\n")
    told = source(repository / "code")
    assert len(told["commit"]) == 40 and told["tree"] == "as committed"
    assert (told["changed_files"], told["changes_digest"]) == ([], None)


def test_a_change_is_told_with_its_file_and_a_digest_of_what_stands_there(repository: Path) -> None:
    def after(content: str) -> dict[str, object]:
        (repository / "code" / "b.h").write_text(content)
        return source(repository / "code")

    once, other, again = after("one\n"), after("two\n"), after("one\n")
    assert (once["tree"], once["changed_files"]) == ("changed", [" M code/b.h"])
    assert once == again and once["changes_digest"] != other["changes_digest"] and once["commit"] == other["commit"]
    assert after("before\n")["tree"] == "as committed"


def test_new_files_and_files_that_have_gone_are_changes_too(repository: Path) -> None:
    (repository / "code" / "a.py").unlink()
    (repository / "new folder").mkdir()
    (repository / "new folder" / "c.cc").write_text("c\n")
    told = source(repository / "code")
    assert told["changed_files"] == [" D code/a.py", "?? new folder/c.cc"]
    (repository / "new folder" / "c.cc").write_text("d\n")
    assert source(repository / "code")["changes_digest"] != told["changes_digest"]


def test_a_folder_that_git_does_not_hold_has_no_commit(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (repository / "ignored").mkdir()
    (repository / "ignored" / "d.py").touch()
    for folder in (repository / "ignored", tmp_path_factory.mktemp("outside")):
        assert source(folder) == {"commit": None, "tree": None, "changed_files": [], "changes_digest": None}


def test_the_compiler_is_the_one_that_would_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho version 7 of $1\necho more\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", f"{fake} -m64")
    monkeypatch.setenv("TANDEM_CXXFLAGS", "-O1 -g")
    told = compiler()
    assert told["options"].endswith(" -O1 -g")
    assert told == {"command": f"{fake} -m64", "version": "version 7 of -m64", "options": told["options"]}
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() == {}


def test_the_digest_of_the_code_follows_sources_and_packages_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("common/a.py", "configs/engine/a.yaml", "jaxinfer/a.py", "common/kernels/a.cc", "tests/a.py", "common/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    whole = code_digest(tmp_path)
    for name in ("tests/a.py", "common/a.md"):
        (tmp_path / name).write_text("after")
        assert code_digest(tmp_path) == whole
    for name in ("common/a.py", "configs/engine/a.yaml", "common/kernels/a.cc"):
        (tmp_path / name).write_text("after")
        assert code_digest(tmp_path) != whole
        (tmp_path / name).write_text("before")
    assert code_digest(tmp_path) == whole
    (tmp_path / "common/a.py").rename(tmp_path / "common/b.py")
    assert code_digest(tmp_path) != whole
    (tmp_path / "common/b.py").rename(tmp_path / "common/a.py")
    monkeypatch.setattr(of_source, "versions", lambda: {"jax": "0.0"})
    assert code_digest(tmp_path) != whole
