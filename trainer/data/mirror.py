"""Brings what a corpus is, apart from its sound, to this host: `corpus.json`, the indexes, a vocabulary of subwords.

A corpus may have 20,000 shards, so their indexes come in one file that `prepare` and `shards index` put beside
`corpus.json`. It is named after what is in it, so `corpus.json` tells its name, and each index is checked against
`corpus.json`; what the file lacks, or all of it where a server has no such file, is asked for one by one.
"""

import fcntl
import gzip
import hashlib
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import show
from trainer.data.index import index_path
from trainer.data.remote import STATE, RemoteConfig, put_empty
from trainer.data.text import SUBWORDS_FILE
from trainer.data.transfer import Source, TransferError, fetch, open_source, public
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.data.prepared import ShardFile

log = logging.getLogger(__name__)

PARALLEL_INDEXES = 16
BUNDLE = "indexes-*.tar.gz"


def bundle_name(files: Mapping[str, "ShardFile"]) -> str:
    """Name of the file with the indexes of these shards: another where one of them is another.

    Args:
        files: every shard by its name below the folder, as in train/shard-000000.tar.
    """
    facts = "".join(f"{name} {files[name].index_crc32}\n" for name in sorted(files))
    return BUNDLE.replace("*", hashlib.blake2b(facts.encode(), digest_size=8).hexdigest())


def bundle_indexes(folder: Path, files: Mapping[str, "ShardFile"]) -> None:
    """Put the indexes of a corpus into one file, unless it is there.

    Args:
        folder: of the corpus.
        files: see `bundle_name`.
    """
    bundle = folder / bundle_name(files)
    if not bundle.is_file():
        temporary = bundle.with_suffix(".tmp")
        with (
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed,  # no name, no time: the same indexes, the same bytes
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for name in sorted(files):
                content = index_path(folder / name).read_bytes()
                member = tarfile.TarInfo(_index_name(name))
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
        temporary.replace(bundle)
    for left in folder.glob(BUNDLE):
        if left != bundle:
            left.unlink()


def _index_name(shard: str) -> str:
    """train/a.tar -> the name of its index below the folder."""
    return index_path(Path(shard)).as_posix()


def _unpack(bundle: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """(name of the shard, its index) of those that are wanted.

    Args:
        wanted: name of the shard by that of its index.

    Raises:
        TransferError: it is no such file, or breaks off.
    """
    try:
        with tarfile.open(bundle, "r|gz") as tar:
            for member in tar:
                if member.name in wanted and member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield wanted[member.name], content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise TransferError(f"{bundle.name}: {error}") from error


@lru_cache(maxsize=8)  # once a process: `corpus.json` is asked for by the data of each split and by the model
def mirror(folder: Path, remote: RemoteConfig) -> None:
    """Bring `corpus.json` and the indexes of a corpus here, and an empty file for each shard that is not.

    An index that is here already is kept while its checksum is the one in `corpus.json`; if it changes, the shard is
    fetched anew too. Where the server cannot be reached and a complete copy is here, that is used.

    Raises:
        UserError: they cannot be had, or are none.
    """
    from trainer.data.prepared import Prepared

    assert remote.url is not None
    where = f"data.remote.url = {public(remote.url)}"
    state = folder / STATE
    _claim(folder, remote.url)  # before anything is made
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.path = {folder}: cannot be made: {error.strerror}; choose another folder") from error
    with (state / "mirror.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _claim(folder, remote.url)
        (state / "url.tmp").write_text(public(remote.url), encoding="utf-8")
        (state / "url.tmp").replace(state / "url")  # in one step: other ranks look at it before they have the lock
        source = open_source(remote.url)
        fresh = state / "corpus.json"
        try:
            for left in state.glob("corpus.json.part*"):  # small: it must not be put together from two versions
                left.unlink()
            fetch(source, "corpus.json", fresh, state / "corpus.json.part")
        except TransferError as error:
            if (folder / "corpus.json").is_file():
                log.warning("%s: cannot be reached (%s); the copy in %s is used", where, error, show(folder))
                return
            raise UserError(f"{where}: corpus.json: {error}; mend the URL, or the way to it") from error
        if (folder / "corpus.json").is_file() and fresh.read_bytes() == (folder / "corpus.json").read_bytes():
            fresh.unlink()
            return
        (folder / "corpus.json").unlink(missing_ok=True)  # until all is here
        prepared = Prepared.load(state)
        wanted = prepared.files
        if len(wanted) != sum(info.shards for info in prepared.splits.values()):
            raise UserError(
                f"{where}: its corpus.json does not list the shards, since it was made by an older version; run "
                "`./launch.sh prepare CONFIG` again where it lies (nothing is written anew but corpus.json)"
            )
        for name in wanted:
            if not re.fullmatch(r"(train|valid|test)/\w[\w@+=.-]*\.tar", name):
                raise UserError(f"{where}: corpus.json: {name!r}: is no name of a shard")

        try:
            if prepared.subwords_sha256:
                _bring_vocabulary(folder, source, prepared.subwords_sha256)
        except TransferError as error:
            raise UserError(f"{where}: {SUBWORDS_FILE}: {error}; put the right one there") from error
        try:
            _bring_indexes(folder, source, wanted)
        except TransferError as error:
            raise UserError(f"{where}: an index: {error}; what came is kept, start again to go on") from error
        except OSError as error:
            raise UserError(f"data.path = {folder}: cannot be written: {error.strerror}; make room") from error
        for shard in {p for split in prepared.splits for p in (folder / split).glob("*.tar")}:
            if f"{shard.parent.name}/{shard.name}" not in wanted:
                index_path(shard).unlink(missing_ok=True)
                shard.unlink()
        fresh.replace(folder / "corpus.json")


def _bring_indexes(folder: Path, source: Source, wanted: Mapping[str, "ShardFile"]) -> None:
    """Bring the indexes here that are not, and put an empty file beside each whose shard is not here.

    Raises:
        TransferError: one did not come, or is another than the one that `corpus.json` names.
        OSError: of this disk.
    """
    state = folder / STATE

    def is_right(name: str, content: bytes) -> bool:
        return zlib.crc32(content) == wanted[name].index_crc32

    def put(name: str, content: bytes) -> None:
        shard = folder / name
        shard.parent.mkdir(exist_ok=True)
        landing = state / f"{shard.parent.name}-{index_path(shard).name}"
        landing.write_bytes(content)
        put_empty(shard, state)  # what is there belongs to another index
        landing.replace(index_path(shard))

    def bring(name: str) -> None:
        landing = state / _index_name(name).replace("/", "-")
        fetch(source, _index_name(name), landing, landing.with_suffix(".part"))
        content = landing.read_bytes()
        if not is_right(name, content):
            raise TransferError("is not the one that corpus.json names")
        put(name, content)

    missing = set()
    for name in wanted:
        index = index_path(folder / name)
        if not index.is_file() or not is_right(name, index.read_bytes()):
            missing.add(name)
        elif not (folder / name).exists():
            put_empty(folder / name, state)
    if len(missing) > 1:
        bundle = bundle_name(wanted)
        landing = state / bundle
        try:
            fetch(source, bundle, landing, landing.with_suffix(".part"))
            for name, content in _unpack(landing, {_index_name(name): name for name in missing}):
                if is_right(name, content):
                    put(name, content)
                    missing.remove(name)
        except TransferError as error:
            log.warning("%s: %s; the indexes come one by one", bundle, error)
        landing.unlink(missing_ok=True)
    with ThreadPoolExecutor(PARALLEL_INDEXES) as pool:
        for future in [pool.submit(bring, name) for name in sorted(missing)]:
            future.result()


def _bring_vocabulary(folder: Path, source: Source, sha256: str) -> None:
    """Bring the subwords here, unless they are.

    Raises:
        TransferError: they did not come, or are not those of this hash.
    """
    vocabulary = folder / SUBWORDS_FILE
    if vocabulary.is_file() and hashlib.sha256(vocabulary.read_bytes()).hexdigest() == sha256:
        return
    landing = folder / STATE / SUBWORDS_FILE
    fetch(source, SUBWORDS_FILE, landing, landing.with_suffix(".part"))
    if hashlib.sha256(landing.read_bytes()).hexdigest() != sha256:
        raise TransferError("is not the one that corpus.json names")
    landing.replace(vocabulary)


def _claim(folder: Path, url: str) -> None:
    """See to it that a folder is the copy of this URL and of nothing else.

    Raises:
        UserError: it holds another corpus.
    """
    name = folder / STATE / "url"
    told = public(url)
    holds = any((folder / part).exists() for part in ("corpus.json", "train", "valid", "test"))
    if not name.is_file():  # asked last: a rank that makes the copy now writes this name before anything else
        if holds:
            raise UserError(
                f"data.path = {folder}: holds a corpus of its own; choose another folder for the copy of "
                f"data.remote.url = {told}, or leave data.remote.url out"
            )
    elif (there := name.read_text(encoding="utf-8")) != told:
        raise UserError(
            f"data.path = {folder}: is the copy of {there}, not of data.remote.url = {told}; choose another folder, or "
            "delete this one"
        )
