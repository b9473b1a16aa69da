"""Whoever is killed, and whatever fails, leaves the old checkpoint or the new one."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.passes import Decompose
from fxlrd.saving.load import load
from fxlrd.saving.save import contents, save
from fxlrd.saving.storage import Disk, write
from tests.saving.nets import Net, X, compressed, empty, equal

OPERATIONS = ["write_tensors", "sync", "rename", "sync", "write_text", "sync", "remove", "remove"]
"""What a save over an old checkpoint does to the disk, in order: the last is to remove the old file of tensors."""

PLAN_WRITTEN = OPERATIONS.index("write_text")


class Watched(Disk):
    """A disk that calls ``before`` and ``after`` around each operation, with its name and its arguments."""

    def __init__(self, before=lambda *_: None, after=lambda *_: None):
        self.before, self.after = before, after

    def __getattribute__(self, name):
        operation = object.__getattribute__(self, name)
        if name not in OPERATIONS:
            return operation

        def watched(*args):
            self.before(name, *args)
            operation(*args)
            self.after(name, *args)

        return watched


def failing(*names):
    """A disk on which some operations fail."""

    def fail(name, *_):
        if name in names:
            raise FAILURES[name]

    return Watched(before=fail)


FULL = OSError(28, "No space left on device")
FAILURES = {
    "write_tensors": FULL,
    "write_text": FULL,
    "remove": PermissionError(1, "Operation not permitted"),  # the sticky bit, and another user's file
}


def write_model(model, path, disk):
    """Save a model as `save` does, on another disk."""
    write(path, *contents(model), disk)


def forked(call):
    """The exit status of a child process that does ``call`` only: torch's threads don't survive a fork, so a model
    that ran there would wait for them forever (which the alarm ends)."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            call()
        finally:
            os._exit(8)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def small():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU())


@pytest.fixture
def old_and_new(tmp_path):
    """Two compressed models, of ranks 2 and 3; the first is saved."""
    old, new = (compressed(small(), torch.ones(2, 16), pipeline=[Decompose(ranks=r)]).model for r in (2, 3))
    save(old, tmp_path)
    return old, new


def test_the_operations_of_a_save(tmp_path, old_and_new):
    names = []
    write_model(old_and_new[1], tmp_path, Watched(before=lambda name, *_: names.append(name)))
    assert names == OPERATIONS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", range(len(OPERATIONS)), ids=[f"{i}-{name}" for i, name in enumerate(OPERATIONS)])
def test_whoever_is_killed_leaves_the_old_or_the_new_checkpoint(tmp_path, old_and_new, nth, when):
    old, new = old_and_new
    operations = iter(range(99))

    def kill(*_):
        if next(operations) == nth:
            os._exit(7)

    assert forked(lambda: write_model(new, tmp_path, Watched(**{when: kill}))) == 7
    loaded = load(tmp_path, empty(small))
    rank = loaded[0].first.out_features
    assert rank == (3 if nth > PLAN_WRITTEN or (nth == PLAN_WRITTEN and when == "after") else 2)
    assert equal(old if rank == 2 else new, loaded, torch.ones(2, 16))
    save(new, tmp_path)
    assert equal(new, load(tmp_path, empty(small)), torch.ones(2, 16))
    assert len(list(tmp_path.iterdir())) == 2, "what the killed one left is gone"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
def test_what_a_killed_write_of_tensors_leaves_is_gone_after_the_next_save(tmp_path):
    class Killed(Disk):
        def write_tensors(self, file, tensors):
            file.with_name(".tmp0a1b2c").write_bytes(b"half")  # where safetensors writes before it renames its file
            os._exit(7)

    new = compressed(Net()).model
    assert forked(lambda: write_model(new, tmp_path, Killed())) == 7
    assert any(tmp_path.rglob(".tmp0a1b2c"))
    save(new, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_old_weights_that_may_not_be_removed_are_no_error(tmp_path):
    save(compressed(Net()), tmp_path)
    new = compressed(Net().eval(), ratio=4).model
    write_model(new, tmp_path, failing("remove"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert equal(new, load(tmp_path, Net()), X)


@pytest.mark.parametrize("name", ["write_tensors", "write_text"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, name):
    old, new = compressed(Net()).model.eval(), compressed(Net(), ratio=4).model
    save(old, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        write_model(new, tmp_path, failing(name))
    assert equal(old, load(tmp_path, Net()).eval(), X)
    assert files <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_a_failed_write_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FxlrdError, match=r"nothing was changed there: OSError: .*No space left"):
        save(compressed(Net()), tmp_path)


def test_other_files_are_not_touched(tmp_path):
    for name in ["notes.txt", "weights-mine.safetensors", "model.safetensors"]:
        (tmp_path / name).write_text("mine")
    save(compressed(Net()), tmp_path)
    save(compressed(Net(), ratio=4), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path):
    old, new = compressed(Net()), compressed(Net(), ratio=4)
    save(old, tmp_path)

    class Replacing(Net):
        """An architecture that load copies after it has read the plan and before it reads the tensors."""

        def __deepcopy__(self, memo):
            self.__class__ = Net
            save(new, tmp_path)
            return copy.deepcopy(self, memo)

    assert equal(new.model.eval(), load(tmp_path, Replacing()).eval(), X)
