"""QEMU's block graph: which image lies below which, and who uses it.

Built from ``query-named-block-nodes`` and ``x-debug-query-block-graph``, the
only pair that shows the edges on every QEMU since 7.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from promoter.chain import BackingChain, Image

THROTTLE = "throttle"
FILTERS = frozenset(
    {THROTTLE, "mirror_top", "commit_top", "copy-on-read", "copy-before-write", "preallocate"}
)


class BlockGraph:
    """One reading of the graph. ``cwd`` is the directory QEMU's relative names start from."""

    def __init__(self, nodes: list[dict[str, Any]], graph: dict[str, Any], cwd: Path) -> None:
        self._info = {node["node-name"]: node for node in nodes}
        self._graph = {node["id"]: node for node in graph["nodes"]}
        self._edges = graph["edges"]
        self._cwd = cwd

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._info)

    @property
    def files(self) -> frozenset[str]:
        """The file names QEMU remembers, made absolute."""
        paths = (self._path(name) for name in self._info)
        return frozenset(str(path) for path in paths if path)

    def is_throttle(self, node: str) -> bool:
        return bool(self._info[node]["drv"] == THROTTLE)

    def chain(self, root: str) -> tuple[tuple[str, ...], BackingChain]:
        """The filters above a disk's active layer, and its backing chain."""
        filters: list[str] = []
        images: list[Image] = []
        node: str | None = root
        while node is not None:
            if self._info[node]["drv"] in FILTERS:
                filters.append(node)
                node = self._child(node, "backing") or self._child(node, "file")
            else:
                images.append(self._image(node))
                node = self._child(node, "backing")
        return tuple(filters), BackingChain(tuple(images))

    def jobs_on(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """The block jobs that hold one of ``nodes``."""
        wanted = set(nodes)
        return tuple(
            sorted(
                {
                    str(parent["name"])
                    for edge, parent in self._parents()
                    if parent["type"] == "block-job"
                    and self._graph[edge["child"]]["name"] in wanted
                }
            )
        )

    def unnamed_writers(self, nodes: Iterable[str]) -> int:
        """How many users without a device write to one of ``nodes``: exports and the like."""
        wanted = set(nodes)
        return sum(
            parent["type"] == "block-backend"
            and not parent["name"]
            and "write" in edge["perm"]
            and self._graph[edge["child"]]["name"] in wanted
            for edge, parent in self._parents()
        )

    def _parents(self) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        return ((edge, self._graph[edge["parent"]]) for edge in self._edges)

    def _child(self, node: str, role: str) -> str | None:
        for edge, parent in self._parents():
            if parent["type"] == "block-driver" and parent["name"] == node and edge["name"] == role:
                return str(self._graph[edge["child"]]["name"])
        return None

    def _image(self, node: str) -> Image:
        entry = self._info[node]
        info = entry["image"]
        specific = info.get("format-specific", {}).get("data", {})
        file_node = self._child(node, "file")
        storage = self._info.get(file_node or node, entry)
        data_node = self._child(node, "data-file")
        data_file = self._path(data_node) if data_node else None
        is_local = data_node is None or data_file is not None
        return Image(
            node=node,
            format="raw" if file_node is None else entry["drv"],
            file=self._path(storage["node-name"]) if is_local else None,
            file_driver=storage["drv"],
            file_node=file_node,
            virtual_size=info["virtual-size"],
            allocated=info.get("actual-size", 0),
            cluster_size=info.get("cluster-size"),
            compat=specific.get("compat"),
            extended_l2=specific.get("extended-l2", False),
            encrypted=entry["encrypted"] or "encrypt" in specific,
            data_file=data_file,
            snapshots=tuple(s["name"] for s in info.get("snapshots", ())),
            bitmaps=tuple(b["name"] for b in _bitmaps(entry, specific)),
            writable=not entry["ro"],
        )

    def _path(self, node: str) -> Path | None:
        """The local file behind a protocol node, or None."""
        entry = self._info[node]
        name = str(entry["file"])
        if entry["drv"] not in ("file", "host_device") or name.startswith("json:"):
            return None
        path = Path(name.removeprefix("file:"))
        return path if path.is_absolute() else (self._cwd.resolve() / path)


def _bitmaps(entry: dict[str, Any], specific: dict[str, Any]) -> list[dict[str, Any]]:
    named = [b for b in entry.get("dirty-bitmaps", ()) if b.get("name")]
    seen = {b["name"] for b in named}
    return named + [b for b in specific.get("bitmaps", ()) if b["name"] not in seen]
