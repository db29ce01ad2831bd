"""`FeatureCache`: tensors by key, in memory and in a folder, each within a budget of bytes.

Both evict the least recently used entries first. In the folder every entry is one safetensors file. It is written when
its entry is put, not when memory is full, so that a killed run loses nothing and other processes find the entry at
once.

Several processes may share a folder. Only the holder of its lock writes, into a temporary file that is then renamed. So
the folder never exceeds its budget, and a reader, which needs no lock, sees a whole file or none. A file that is
damaged or disappears is a miss.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from segrl.caching.content import raw_bytes
from segrl.errors import SegRLError

__all__ = ["FeatureCache", "encoding_batches"]

_ENTRY, _TEMPORARY = ".features.safetensors", ".features.safetensors.tmp"  # no other file in the folder is touched
_LOCK = "features.lock"
_CHECKSUM = "crc32"
_AT_ONCE = 4  # images on a CPU whose features are not kept: a fifth faster than one by one, and so are more
_LOCK_TIMEOUT = 60.0  # seconds; writing one entry takes a fraction of a second


def encoding_batches(
    items: Sequence[Any], device: str, size: int | None = None, *, kept: bool = True
) -> list[Sequence[Any]]:
    """Split what is to be encoded into batches: of `size` (all, if None) on an accelerator, of one or four on a CPU.

    Features depend on the size of their batch, by rounding. A run that is resumed has an empty cache and so other
    batches than one left alone. On a CPU those that are kept are encoded alone, and both are equal to the bit.

    Args:
        items: Images, slices or their keys.
        device: Type of the encoder's device, such as "cpu".
        size: Items at once.
        kept: Whether the features serve other batches than this one.

    Example:
        >>> encoding_batches("abc", "cpu"), encoding_batches("abc", "cuda", 2)
        (['a', 'b', 'c'], ['ab', 'c'])
        >>> encoding_batches("abcde", "cpu", kept=False)
        ['abcd', 'e']
    """
    step = (1 if kept else _AT_ONCE) if device == "cpu" else size or max(len(items), 1)
    return [items[at : at + step] for at in range(0, len(items), step)]


class FeatureCache:
    """Tensors by key, in memory and on disk, each within a budget.

    Args:
        memory_bytes: Budget in memory, where tensors stay on their device; 0 keeps nothing there.
        folder: Folder where entries are also written, for other processes and later runs; created when needed.
        disk_bytes: Budget of the files in `folder`; with a folder it must be above 0.

    Attributes:
        hits: Number of requests answered from memory.
        disk_hits: Number of requests answered from the folder.
        misses: Number of requests that found nothing.
        nbytes: Bytes in memory now.

    A folder that cannot be written (full, read-only) gives one warning; its entries can still be read. A copy, also by
    pickle, has the same settings and nothing in memory.

    Raises:
        SegRLError: A budget below 0, or a folder without one.

    Example:
        >>> cache = FeatureCache(memory_bytes=100)
        >>> cache.put("a", [torch.zeros(20)])
        >>> cache.put("b", [torch.ones(20)])  # 160 bytes: the older entry goes
        >>> cache.get("a"), len(cache.get("b"))
        (None, 1)
    """

    def __init__(self, memory_bytes: int = 2**30, folder: str | Path | None = None, disk_bytes: int = 0) -> None:
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if value < 0:
                raise SegRLError(f"{name}={value}: expected a number of bytes, 0 or more")
        if folder is not None and not disk_bytes:
            raise SegRLError(
                f"folder={str(folder)!r} with disk_bytes=0: nothing would fit; give it a budget (feature_cache_disk in "
                "the trainers' settings) or pass no folder"
            )
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self.folder = None if folder is None else Path(folder).expanduser()
        self.hits = self.disk_hits = self.misses = self.nbytes = 0
        self._kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()  # from the oldest to the newest use
        self._writable = self.folder is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.memory_bytes, self.folder, self.disk_bytes)

    def get(self, key: str, device: torch.device | str | None = None) -> tuple[Tensor, ...] | None:
        """Return the tensors of `key`, or None. They belong to the cache: do not change them in place.

        Args:
            key: The key given to `put`.
            device: Device to return and keep them on; None leaves them on theirs, which is the CPU if they come from
                disk.
        """
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
        else:
            found = self._read(key)
            if found is None:
                self.misses += 1
                return None
            self.disk_hits += 1
        if device is not None:
            found = tuple(tensor.to(device) for tensor in found)
        self._keep(key, found)
        return found

    def put(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Keep detached `tensors` under `key`, with exact dtype, shape and values; replaces an older entry."""
        own = tuple(_own(tensor) for tensor in tensors)
        self._keep(key, own)
        if self._writable:
            self._write(key, own)

    def clear(self) -> None:
        """Empty the memory. Files and counters are kept."""
        self._kept.clear()
        self.nbytes = 0

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _keep(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        self.nbytes -= _size(self._kept.pop(key, ()))
        if _size(tensors) > self.memory_bytes:
            return
        self._kept[key] = tensors
        self.nbytes += _size(tensors)
        while self.nbytes > self.memory_bytes:
            self.nbytes -= _size(self._kept.popitem(last=False)[1])

    # ---- disk --------------------------------------------------------------------------------------------------------

    def _path(self, folder: Path, key: str) -> Path:
        return folder / (hashlib.blake2b(key.encode(), digest_size=16).hexdigest() + _ENTRY)

    def _read(self, key: str) -> tuple[Tensor, ...] | None:
        if self.folder is None:
            return None
        path = self._path(self.folder, key)
        try:
            content = path.read_bytes()
        except OSError:  # not there, or not any more
            return None
        tensors = _unpack(content)
        with suppress(OSError):  # another process may be faster, and a folder to read only is fine here
            path.unlink() if tensors is None else _mark_used(path)
        return tensors

    def _write(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        assert self.folder is not None
        content = _pack(tensors)
        if len(content) > self.disk_bytes:
            return
        path = self._path(self.folder, key)
        temporary = path.with_name(path.name.removesuffix(_ENTRY) + _TEMPORARY)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / _LOCK, timeout=_LOCK_TIMEOUT).acquire(poll_interval=0.01):
                path.unlink(missing_ok=True)
                self._make_room(self.folder, len(content))
                try:
                    temporary.write_bytes(content)
                    _mark_used(temporary)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"cannot write features to {str(self.folder)!r} ({error}); check feature_cache_dir. We go on without "
                "writing there: what does not fit into memory is computed again",
                stacklevel=3,
            )

    def _make_room(self, folder: Path, size: int) -> None:
        """Delete the oldest entries until `size` more bytes fit; the caller holds the lock."""
        entries = []
        for item in os.scandir(folder):
            if item.name.endswith(_TEMPORARY):  # left by a process that died: only the holder of the lock writes
                Path(item).unlink(missing_ok=True)
            elif item.name.endswith(_ENTRY):
                with suppress(FileNotFoundError):  # damaged, and removed by its reader
                    entries.append((item.stat().st_mtime_ns, item.name, item.stat().st_size))
        total = size + sum(bytes_ for *_, bytes_ in entries)
        for _, name, bytes_ in sorted(entries):
            if total <= self.disk_bytes:
                break
            (folder / name).unlink(missing_ok=True)
            total -= bytes_


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph; a view is copied, so that it does not keep a whole batch in memory."""
    tensor = tensor.detach()
    if tensor.is_inference() or tensor.untyped_storage().nbytes() > tensor.nbytes:
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _mark_used(path: Path) -> None:
    """Set the time of the last access; file systems record it coarsely, and often not when a file is read."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _pack(tensors: Sequence[Tensor]) -> bytes:
    """Return the content of a safetensors file with the tensors, named "0", "1", ..., and their checksum."""
    ready = [tensor.cpu().clone(memory_format=torch.contiguous_format) for tensor in tensors]
    state = {str(number): tensor for number, tensor in enumerate(ready)}
    return save({**state, _CHECKSUM: torch.tensor(_checksum(ready))})


def _unpack(content: bytes) -> tuple[Tensor, ...] | None:
    """Return the tensors that `_pack` packed, or None if the content is damaged."""
    try:
        state = load(content)
        checksum = state.pop(_CHECKSUM).item()
        tensors = tuple(state[str(number)] for number in range(len(state)))
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    return tensors if _checksum(tensors) == checksum else None


def _checksum(tensors: Sequence[Tensor]) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(raw_bytes(tensor), value)
    return value
