"""Names inside a folder, with links followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpr.data.image_files import PathGuard


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders below a root, with links that stay inside, lead out, and lead to nothing."""
    root = tmp_path / "root"
    (root / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "other" / "d").mkdir(parents=True)
    for file in (root / "a" / "b" / "c" / "1.jpg", tmp_path / "other" / "d" / "1.jpg"):
        file.touch()
    (root / "a" / "out").symlink_to(tmp_path / "other")
    (root / "a" / "in").symlink_to(root / "a" / "b")
    (root / "a" / "b" / "up").symlink_to("..")
    (root / "a" / "nothing").symlink_to(tmp_path / "missing")
    (root / "a" / "b" / "file.jpg").symlink_to(tmp_path / "other" / "d" / "1.jpg")
    return root


def test_guard_agrees_with_resolved_paths(root: Path) -> None:
    """Folders are asked in both orders: a folder that is known must not change what is found of those below it."""
    names = [
        *("a/b/c/1.jpg", "a/in/c/1.jpg", "a/b/up/b/c/1.jpg", "a/b/up/out/d/1.jpg", "a/out/d/1.jpg"),
        *(
            "a/out/1.jpg",
            "a/nothing/x/1.jpg",
            "a/b/file.jpg",
            "a/b/../out/d/1.jpg",
            "a/missing/1.jpg",
            "../root/a/1.jpg",
        ),
    ]
    expected = {name: (root / name).resolve().is_relative_to(root.resolve()) for name in names}
    assert set(expected.values()) == {True, False}
    for order in (names, names[::-1]):
        guard = PathGuard(root)
        assert {name: guard.is_inside(name) for name in order} == expected


def test_guard_follows_links_into_allowed_folders(root: Path) -> None:
    guard = PathGuard(root, [root.parent / "other"])
    assert guard.is_inside("a/out/d/1.jpg")
    assert not guard.is_inside("a/nothing/x/1.jpg")
