"""What people see on a terminal of 80 columns."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from tests.cli import ended, start
from tests.vm import VM, Disk, base, linked_clone


def shown(state: Path, *words: object) -> str:
    """What a terminal is given, without colours."""
    ours, its = os.openpty()
    said = list[bytes]()

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 16):
                said.append(part)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    narrow = {"COLUMNS": "80", "TERM": "xterm"}
    process = start(state, *words, output=its, environment=narrow)
    reader.start()
    os.close(its)
    assert ended(process).code == 0
    reader.join()
    os.close(ours)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", b"".join(said).decode())


def test_no_path_is_cut_or_broken(tmp_path: Path) -> None:
    state, deep = tmp_path / "state", tmp_path / "of-a-customer-with-a-long-name" / "web-server"
    deep.mkdir(parents=True)
    clone = linked_clone(base(), deep / "web.qcow2")
    with VM(tmp_path, [Disk(clone)]) as guest:
        guest.wait_for_acks(20)
        assert re.search(
            rf"{clone}: qcow2, 192.0 MiB, \S+ MiB allocated", shown(state, "chain", guest.monitor)
        )
        promoted = shown(state, "promote", guest.monitor)
        assert re.search(rf"old overlay +{clone}\.aside-\w{{8}}\s", promoted)
        assert re.search(
            rf" promote +{guest.monitor} +done +\S+\+00:00 +promoted vd0",
            shown(state, "job", "list"),
        )
