"""Locks that are open in a forked process: the thread that held one has stayed behind, with what it was at.

That is left as an interrupt would have left it, which the owners of these locks are made for.
"""

from __future__ import annotations

import os
import threading
import weakref

_locks: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def lock_of(owner: object, name: str = "_lock") -> threading.Lock:
    """A lock, to be the attribute `name` of its owner; a forked process has another one there."""
    _locks[owner] = name
    return threading.Lock()


def _renew() -> None:
    for owner, name in list(_locks.items()):
        setattr(owner, name, threading.Lock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
