"""The commit that records state: of the clone, of an install from git, of neither."""

import importlib.metadata
import json
import subprocess

import pytest

from sparsemm_lmms import source_commit as module


@pytest.fixture
def commit_of(tmp_path, monkeypatch):
    """`source_commit` of a package that lies in `tmp_path`, installed as `direct_url` says."""

    def ask(direct_url=None):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "sparsemm_lmms" / "source_commit.py"))
        text = None if direct_url is None else json.dumps(direct_url)
        distribution = type("Distribution", (), {"read_text": lambda self, name: text})
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution())
        module.source_commit.cache_clear()
        return module.source_commit()

    yield ask
    module.source_commit.cache_clear()


def test_a_clone_and_what_was_changed_in_it(commit_of, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, "-C", tmp_path, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert commit_of({"vcs_info": {"commit_id": "another"}}) == head
    (tmp_path / "file").write_text("two")
    assert commit_of() == head + "-dirty"


def test_outside_of_a_clone(commit_of):
    assert commit_of({"vcs_info": {"commit_id": "1234"}}) == "1234"
    assert commit_of({"dir_info": {}}) is None  # pip install . of a folder
    assert commit_of() is None
