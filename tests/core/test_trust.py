"""Which executable files are loaded: `core.trust`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmvision_export.core import trust
from mmvision_export.core.files import sha256_of
from mmvision_export.core.trust import UntrustedError, record_built, refuse_untrusted


@pytest.fixture(autouse=True)
def no_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    file = folder / "library.so"
    file.write_bytes(b"code")
    file.chmod(0o644)
    return file


def is_refused(file: Path, *, named: bool = False) -> bool:
    try:
        refuse_untrusted(file, sha256_of(file), named=named)
    except UntrustedError as error:
        assert error.hint
        assert error.reason == "unsafe"
        assert str(file) in str(error)
        return True
    return False


def test_what_nobody_vouches_for_is_refused(library: Path) -> None:
    assert is_refused(library)
    assert not is_refused(library, named=True)


def test_what_was_built_here_is_loaded_wherever_it_lies(library: Path, tmp_path: Path) -> None:
    assert record_built(sha256_of(library), library) is None
    assert not is_refused(library)
    copy = tmp_path / "copy.so"
    copy.write_bytes(library.read_bytes())
    copy.chmod(0o600)
    assert not is_refused(copy)
    copy.write_bytes(b"code of another")
    assert is_refused(copy)


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("mode", [0o002, 0o020])
def test_what_others_can_write_to_is_refused_however_it_is_named(
    library: Path, what: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_is_private_group", lambda gid: False)
    record_built(sha256_of(library), library)
    place = library if what == "file" else library.parent
    place.chmod(place.stat().st_mode | mode)
    assert is_refused(library, named=True)
    place.chmod(place.stat().st_mode & ~mode)
    assert not is_refused(library)


def test_a_group_of_this_user_alone_may_write(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_is_private_group", lambda gid: gid == os.getegid())
    library.chmod(0o664)
    assert not is_refused(library, named=True)


def test_a_shared_group_is_not_private() -> None:
    grp = pytest.importorskip("grp")
    shared = [group.gr_gid for group in grp.getgrall() if set(group.gr_mem) - {"root"}]
    assert not any(trust._is_private_group(gid) for gid in shared if gid != 0)
    assert not trust._is_private_group(2**30)  # there is no such group


def test_a_file_of_another_user_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_built(sha256_of(library), library)
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(library, 12345, -1)
    assert is_refused(library, named=True)


def test_a_file_in_a_sticky_folder_is_as_safe_as_its_owner(library: Path) -> None:
    library.parent.chmod(0o1777)
    assert not is_refused(library, named=True)


def test_a_link_is_judged_by_what_it_leads_to(library: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.so"
    link.symlink_to(library)
    assert not is_refused(link, named=True)
    library.chmod(0o666)
    assert is_refused(link, named=True)


def test_a_record_that_others_could_write_says_nothing(library: Path, tmp_path: Path) -> None:
    record_built(sha256_of(library), library)
    assert not is_refused(library)
    (folder,) = (tmp_path / "config").glob("*/built")
    folder.chmod(0o777)
    assert is_refused(library)


def test_where_no_record_can_be_kept(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("no folder")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(blocker))
    assert record_built(sha256_of(library), library)
    assert is_refused(library)
    monkeypatch.setattr(trust, "config_folder", lambda: None)
    assert record_built(sha256_of(library), library)
    assert is_refused(library)
