"""Shards from a web server, a bucket or a command arrive whole, once, within a limit; what never came is on record."""

import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.servers import Bucket, Fault, Proxy, moto, nginx
from tests.helpers import overrides
from trainer import recipe
from trainer.data import remote, transfer
from trainer.data.index import Index
from trainer.data.mirror import _claim, bundle_name, mirror
from trainer.data.prepared import Prepared
from trainer.data.remote import STATE, Ahead, Cache, RemoteConfig
from trainer.data.transfer import Answer, Http, Pipe, Source, TransferError, Version, fetch, open_source
from trainer.errors import UserError

SIZE = 300_000
NAME = "train/a.tar"
SECRET = "wJalrXUtnFEMI"


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pauses, no settings of the user."""
    monkeypatch.setattr(transfer, "BACK_OFF_SECONDS", 0.0)
    for name in [n for n in os.environ if n.startswith("AWS_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    mirror.cache_clear()
    transfer._s3_client.cache_clear()
    yield
    transfer._s3_client.cache_clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with moto() as address:
        yield address


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """nginx and the folder that it serves."""
    root, folder = tmp_path_factory.mktemp("web"), tmp_path_factory.mktemp("nginx")
    with nginx(root, folder) as address:
        yield address, root


@pytest.fixture(params=["http", "s3"])
def server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Source, Callable[[str, bytes], None], Proxy]]:
    """A source behind the proxy, what puts a file there, and the proxy."""
    if request.param == "http":
        address, root = request.getfixturevalue("web")

        def put(name: str, data: bytes) -> None:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(data)
            os.utime(root / name, ns=(0, random.getrandbits(60)))  # nginx makes the ETag of time and size

        with Proxy(address).running() as proxy:
            yield open_source(f"http://{proxy.address}/"), put, proxy
    else:
        bucket = Bucket(request.getfixturevalue("s3"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        with Proxy(bucket.address).running() as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{proxy.address}")
            yield open_source("s3://speech/folder"), lambda n, data: bucket.put(f"folder/{n}", data), proxy


Server = tuple[Source, Callable[[str, bytes], None], Proxy]


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    source, put, proxy = server
    put(NAME, content(1))
    proxy.faults = [Fault(500), Fault(cut=100_000), Fault(503), Fault(cut=50_000), Fault(429), Fault(cut=0)]
    received = fetch(source, NAME, tmp_path / "a", tmp_path / "a.part", SIZE)
    assert (tmp_path / "a").read_bytes() == content(1)
    assert received == SIZE, "no byte came twice"
    starts = [asked[1] for asked in proxy.asked]
    assert starts == [None, None, *["bytes=100000-"] * 2, *["bytes=150000-"] * 3]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("size", [SIZE, SIZE - 1000, SIZE + 1000])
def test_two_states_of_an_object_are_never_put_together(server: Server, tmp_path: Path, size: int) -> None:
    source, put, proxy = server
    put(NAME, content(1))
    proxy.faults = [Fault(cut=100_000, then=lambda: put(NAME, content(2, size)))]
    fetch(source, NAME, tmp_path / "a", tmp_path / "a.part")
    assert (tmp_path / "a").read_bytes() == content(2, size)


def test_a_server_that_takes_no_conditions_is_not_believed(tmp_path: Path) -> None:
    """As where the ETag is a weak one: the answer to a range is that of another object."""
    answers = [
        Answer(0, Version("one", 10), io.BytesIO(b"0123")),
        Answer(4, Version("two", 10), io.BytesIO(b"efghij")),
        Answer(0, Version("two", 10), io.BytesIO(b"abcdefghij")),
    ]
    starts = []

    class Careless:
        def open(self, name: str, start: int, version: Version) -> Answer:
            starts.append((start, version.etag))
            return answers.pop(0)

    fetch(Careless(), NAME, tmp_path / "a", tmp_path / "a.part", 10)
    assert (tmp_path / "a").read_bytes() == b"abcdefghij"
    assert starts == [(0, None), (4, "one"), (0, None)]


def test_a_part_of_an_earlier_process_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    source, put, proxy = server
    put(NAME, content(1))
    proxy.faults = [Fault(cut=200_000), *[Fault(500)] * transfer.TRIES]
    with pytest.raises(TransferError, match="HTTP 500"):
        fetch(source, NAME, tmp_path / "a", tmp_path / "a.part", SIZE)
    assert not (tmp_path / "a").exists()
    assert fetch(source, NAME, tmp_path / "a", tmp_path / "a.part", SIZE) == SIZE - 200_000
    assert (tmp_path / "a").read_bytes() == content(1)
    fetch(source, NAME, tmp_path / "a", tmp_path / "a.part", SIZE)
    (tmp_path / "a").rename(tmp_path / "a.part")  # the process ended before the last step
    (tmp_path / "a.part.json").write_text(json.dumps({"etag": "another", "size": SIZE + 1}))
    fetch(source, NAME, tmp_path / "a", tmp_path / "a.part", SIZE)
    assert (tmp_path / "a").read_bytes() == content(1)


def test_giving_up_says_why(server: Server, tmp_path: Path) -> None:
    source, put, proxy = server
    with pytest.raises(TransferError, match=r"^HTTP 404 not found$"):
        fetch(source, "train/none.tar", tmp_path / "a", tmp_path / "a.part")
    assert len(proxy.asked) == 1, "what is not there is not asked for again"
    put(NAME, content(1))
    proxy.faults = [Fault(500)] * 99
    with pytest.raises(TransferError, match=rf"^HTTP 500 \({transfer.TRIES} tries\)$"):
        fetch(source, NAME, tmp_path / "a", tmp_path / "a.part", SIZE)
    proxy.faults = []
    with pytest.raises(TransferError, match=r"has 300,000 bytes where corpus\.json says 300,001"):
        fetch(source, NAME, tmp_path / "a", tmp_path / "a.part", SIZE + 1)
    assert list(tmp_path.iterdir()) == []


def test_nobody_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"^no connection \(Connection refused\) \(6 tries\)$"):
        fetch(Http("http://127.0.0.1:9/"), NAME, tmp_path / "a", tmp_path / "a.part")


def test_the_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(transfer, "BACK_OFF_SECONDS", 1.0)
    monkeypatch.setattr(transfer.time, "sleep", pauses.append)

    class Away:
        def open(self, name: str, start: int, version: Any) -> Any:
            raise TransferError("away", pause=12.0 if len(pauses) == 2 else 0.0)

    for _ in range(2):
        with pytest.raises(TransferError):
            fetch(Away(), NAME, tmp_path / "a", tmp_path / "a.part")
    first, second = pauses[:5], pauses[5:]
    assert first != second
    assert all(0 <= pause <= 2**n for n, pause in enumerate(first) if n != 2)
    assert first[2] == 12, "the server's wish counts"


def test_a_command_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "it's; here").write_bytes(content(3))
    target, part = tmp_path / "a", tmp_path / "a.part"
    fetch(Pipe(f"cat {tmp_path}/{{}}"), "it's; here", target, part)
    assert target.read_bytes() == content(3)
    with pytest.raises(TransferError, match=r"the command ended with code 7; .* \(6 tries\)"):
        fetch(Pipe("(echo {}; exit 7) | cat"), "x", target, part)
    with pytest.raises(TransferError, match="ended after 4 of 5 bytes"):
        fetch(Pipe("printf {}"), "four", target, part, 5)


def process_state(folder: Path) -> list[str]:
    """State, parent, group of a process; nothing once it has gone."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def test_a_command_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(transfer, "TRIES", 1)
    with pytest.raises(TransferError, match="said nothing"):
        fetch(Pipe(f"echo $$ > {tmp_path}/pid; sleep 1000 | cat; echo {{}}"), "x", tmp_path / "a", tmp_path / "a.part")
    group = (tmp_path / "pid").read_text().strip()
    deadline = time.monotonic() + 20
    while any(s[2] == group and s[0] not in "ZX" for s in map(process_state, Path("/proc").glob("[0-9]*")) if s):
        assert time.monotonic() < deadline, "someone of its group is left"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("ftp://host/x", "wanted http://, https://, s3:// or pipe:"),
        (f"https://me:{SECRET}@host/x", "holds a password"),
        (f"https://host/x?sig={SECRET}", "without \\? and #"),
        ("s3:///x", "names no bucket"),
        ("http://", "names no host"),
        (f"pipe:curl -H {SECRET} host", "wanted {} in the command"),
    ],
)
def test_a_wrong_url_is_refused_without_showing_it(url: str, wanted: str) -> None:
    for take in (open_source, lambda url: recipe.load("speech/tones", [f"data.remote.url={url}"])):
        with pytest.raises(UserError, match=wanted) as caught:
            take(url)
        assert SECRET not in str(caught.value)


def test_no_message_holds_a_secret(
    web: tuple[str, Path], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TOKEN", SECRET)
    address, root = web
    (root / "secret.tar").write_bytes(b"x" * 99)
    with Proxy(address, password="bWU6").running() as proxy:  # base64 of "me:"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        proxy.faults = [Fault(500), Fault(cut=5)]
        fetch(Http(f"http://{proxy.address}"), "secret.tar", tmp_path / "a", tmp_path / "a.part")
        told = []
        for url in (f"http://{proxy.address}", "s3://speech/x", 'pipe:echo {} "$TOKEN"; exit 3'):
            cache = Cache(tmp_path / "cache", url, {"train/none.tar": 9}, 99)
            with pytest.raises(TransferError) as caught:
                cache.open("train/none.tar")
            told.append(str(caught.value))
    assert "404" in told[0], "the password of ~/.netrc was sent"
    everything = caplog.text + "".join(told) + (tmp_path / "cache" / STATE / "missing.jsonl").read_text()
    assert len(caplog.records) > 3
    assert SECRET not in everything


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(web: tuple[str, Path], tmp_path: Path) -> tuple[str, dict[str, int]]:
    """URL of a folder with six files, and their sizes."""
    address, root = web
    folder = root / tmp_path.name
    (folder / "train").mkdir(parents=True)
    for number in range(6):
        (folder / f"train/{number}.tar").write_bytes(content(number))
    return f"http://{address}/{tmp_path.name}", {f"train/{number}.tar": SIZE for number in range(6)}


def here(cache: Cache) -> list[int]:
    paths = [p for p in (cache.folder / "train").glob("*.tar") if p.stat().st_size]
    return sorted(int(p.stem) for p in paths)


def make_cache(folder: Path, shards: tuple[str, dict[str, int]], room: int, max_open: int) -> Cache:
    (folder / "train").mkdir(parents=True, exist_ok=True)
    return Cache(folder, *shards, limit=room * SIZE, max_open=max_open)


def test_what_is_unused_for_longest_goes_and_what_is_open_stays(
    tmp_path: Path, shards: tuple[str, dict[str, int]], caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(tmp_path, shards, room=3, max_open=1)
    for number in (0, 1, 2, 0, 3):
        assert os.pread(cache.open(f"train/{number}.tar").fileno(), SIZE, 0) == content(number)
    assert here(cache) == [0, 2, 3]
    assert (cache.account.hits, cache.account.fetched, cache.account.removed) == (1, 4, 1)
    other = make_cache(tmp_path, shards, room=3, max_open=3)
    held = [other.open(f"train/{number}.tar") for number in (2, 3, 0)]
    cache.path("train/4.tar")
    assert here(cache) == [0, 2, 3, 4], "all were in use"
    assert "takes more than data.remote.cache_gb" in caplog.text
    cache._fetch("train/5.tar", ahead=True)
    assert here(cache) == [0, 2, 3, 4], "nothing is fetched ahead where there is no room"
    assert [os.pread(f.fileno(), SIZE, 0) for f in held] == [content(n) for n in (2, 3, 0)]
    held.clear()
    other.close()
    cache.path("train/5.tar")
    assert len(here(cache)) == 3, "back within the limit"
    assert {4, 5} <= set(here(cache))
    cache.close()


def use_all(url: str, folder: Path, sizes: dict[str, int], room: int, seed: int) -> None:
    """What one of several processes does: reads everything twice, and looks at every byte."""
    cache = Cache(folder, url, sizes, room, max_open=2)
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    cache.prefetch(names)
    for name in names * 2:
        got = os.pread(cache.open(name).fileno(), SIZE + 1, 0)
        assert got == content(int(Path(name).stem)), name


def run_many(url: str, folder: Path, sizes: dict[str, int], room: int) -> None:
    """Three processes use one cache."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=use_all, args=(url, folder, sizes, room, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_processes_share_a_cache(tmp_path: Path, shards: tuple[str, dict[str, int]]) -> None:
    url, sizes = shards
    with Proxy(url.split("/")[2]).running() as proxy:
        address = url.replace(url.split("/")[2], proxy.address)
        run_many(address, tmp_path / "cache", sizes, 6 * SIZE)
        asked = [path.rpartition("/")[2] for path, _ in proxy.asked]
    assert sorted(asked) == [f"{n}.tar" for n in range(6)], "each was fetched once, by one of them"
    # Too small for all that they hold: every read is right all the same, and nothing is left over.
    run_many(url, tmp_path / "small", sizes, 2 * SIZE)
    assert not list((tmp_path / "small" / STATE).glob("*.empty*"))


def test_a_process_that_is_killed_holds_up_nobody(
    tmp_path: Path, shards: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BLOCK", 1 << 14)
    url, sizes = shards
    reached = threading.Event()
    released = threading.Event()

    def stall() -> None:
        reached.set()
        released.wait(30)

    with Proxy(url.split("/")[2], faults=[Fault(cut=200_000, then=stall)]).running() as proxy:
        address = url.replace(url.split("/")[2], proxy.address)
        first = make_cache(tmp_path, (address, sizes), room=6, max_open=6)
        process = multiprocessing.get_context("fork").Process(target=first.path, args=("train/0.tar",))
        process.start()
        try:
            assert reached.wait(30)
            part = tmp_path / STATE / "train-0.tar.part"
            deadline = time.monotonic() + 30
            while not part.exists() or part.stat().st_size < 100_000:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.kill()
            process.join()
        have = part.stat().st_size
        cache = make_cache(tmp_path, (address, sizes), room=6, max_open=6)
        assert cache.path("train/0.tar").read_bytes() == content(0)
        released.set()
        assert cache.account.fetched_bytes == SIZE - have
        assert proxy.asked[1][1] == f"bytes={have}-"


def test_what_never_came_is_on_record_and_not_asked_for_again(
    tmp_path: Path, shards: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sizes = shards
    cache = make_cache(tmp_path, (url, {**sizes, "train/gone.tar": 7}), room=6, max_open=6)
    for _ in range(3):
        with pytest.raises(TransferError, match="HTTP 404 not found"):
            cache.open("train/gone.tar")
    (row,) = [json.loads(line) for line in (tmp_path / STATE / "missing.jsonl").read_text().splitlines()]
    assert (row["shard"], row["reason"]) == ("train/gone.tar", "HTTP 404 not found")
    assert cache.missing == {"train/gone.tar": "HTTP 404 not found"}
    with pytest.raises(TransferError, match=r"is not in corpus\.json"):
        cache.open("../../etc/passwd")
    monkeypatch.setattr(remote, "AGAIN_SECONDS", 0.0)
    cache.sizes["train/gone.tar"] = SIZE
    with pytest.raises(TransferError):
        cache.open("train/gone.tar")


# --- a corpus --------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(web: tuple[str, Path], corpus: Path, tmp_path: Path) -> tuple[str, Path]:
    """URL and folder of a corpus on the web server."""
    address, root = web
    folder = root / f"{tmp_path.name}-corpus"
    shutil.copytree(corpus, folder, ignore=shutil.ignore_patterns(".prepare"))
    return f"http://{address}/{folder.name}", folder


def epochs(dataset: Any) -> list[Any]:
    """What a run would see in two epochs."""
    seen = []
    for epoch in range(2):
        for step in dataset.plan.epoch(epoch):
            for micro_batch in step.micro_batches:
                batch = dataset.load(micro_batch)
                seen.append((batch["keys"], batch["valid"].tolist(), batch["checksums"], batch["labels"].tolist()))
    return seen


@pytest.mark.parametrize("kind", ["http", "s3", "pipe"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_remote_corpus_is_the_corpus(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    corpus: Path,
    published: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    split: str,
) -> None:
    url, folder = published
    if kind == "s3":
        bucket = Bucket(request.getfixturevalue("s3"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{bucket.address}")  # and no keys: a bucket that is open to all
        for path in filter(Path.is_file, folder.rglob("*.*")):
            bucket.put(f"corpora/tones/{path.relative_to(folder)}", path.read_bytes(), "public-read")
        url = "s3://speech/corpora/tones/"
    elif kind == "pipe":
        url = f"pipe:cat {folder}/{{}} | cat"
    local = recipe.load("speech/tones", overrides(corpus, tmp_path)).build_dataset(split)
    more = f"data.remote.url={url}"
    task = recipe.load("speech/tones", overrides(tmp_path / "copy", tmp_path, more))
    dataset = task.build_dataset(split)
    assert dataset.identity == local.identity
    assert epochs(dataset) == epochs(local)
    assert all(p.stat().st_size for p in (tmp_path / "copy" / split).glob("*.tar"))


def test_a_shard_that_never_comes_costs_its_samples_only(
    tmp_path: Path, corpus: Path, published: tuple[str, Path]
) -> None:
    url, folder = published
    (folder / "train/shard-000001.tar").unlink()
    local = recipe.load("speech/tones", overrides(corpus, tmp_path)).build_dataset("train")
    lost = {key for key, shard in zip(local.index.keys, local.index.shard, strict=True) if shard == 1}
    more = f"data.remote.url={url}"
    dataset = recipe.load("speech/tones", overrides(tmp_path / "copy", tmp_path, more)).build_dataset("train")
    faults = {}
    for step in dataset.plan.epoch(0):
        for micro_batch in step.micro_batches:
            batch = dataset.load(micro_batch)
            faults |= {fault.key: (fault.reason, fault.detail) for fault in batch["faults"]}
            assert [not v for v in batch["valid"].tolist()] == [key in lost for key in batch["keys"]]
    assert set(faults) == lost
    assert set(faults.values()) == {("missing", "train/shard-000001.tar never came: HTTP 404 not found")}


def test_the_next_window_is_fetched_ahead_in_the_order_of_the_plan(
    tmp_path: Path, corpus: Path, published: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(Cache, "prefetch", lambda self, names: asked.append(list(names)))
    more = [f"data.remote.url={published[0]}", "plan.window_shards=2"]
    more += ["plan.num_buckets=1", "plan.micro_batches_per_step=1"]  # so few samples fill a step in every window
    dataset = recipe.load("speech/tones", overrides(tmp_path / "copy", tmp_path, *more)).build_dataset("train")
    seen: set[str] = set()
    for epoch in range(2):
        for step in dataset.plan.epoch(epoch):
            for micro_batch in step.micro_batches:
                dataset.load(micro_batch)
                read = {f"train/shard-{dataset.index.shard[row]:06d}.tar" for row in micro_batch.samples}
                seen |= read
                ahead = {name for names in asked for name in names}
                assert read <= ahead, "never a shard that was not asked for ahead"
        assert len(asked) == 4 * (epoch + 1), "once a window: seven shards, two each"
    assert len(seen) == 7
    assert len(asked[0]) == 4
    # Each list begins with the window that is read and goes on with the next, over the end of the epoch too.
    for now, following in itertools.pairwise(asked):
        assert set(now[-2:]) >= set(following[:1])


def test_ahead_asks_for_everything_where_all_shards_are_read_at_once() -> None:
    ahead = Ahead(["a", "b", "c"], 0, None)
    assert ahead(0, [2]) == ["a", "b", "c"]
    assert ahead(0, [1]) is None


def test_prefetch_brings_files_in_the_background(tmp_path: Path, shards: tuple[str, dict[str, int]]) -> None:
    cache = make_cache(tmp_path, shards, room=6, max_open=6)
    cache.prefetch(sorted(shards[1]))
    deadline = time.monotonic() + 30
    while len(here(cache)) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    cache.path("train/3.tar")
    assert cache.account.hits == 1


@pytest.mark.parametrize("bundle", ["whole", "of another state", "cut", "gone"])
def test_all_indexes_come_in_one_file(
    tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture, bundle: str
) -> None:
    """Two requests for a corpus of any number of shards; where that file is no good, one for each index it lacks."""
    folder, log = shutil.copytree(corpus, tmp_path / "there"), tmp_path / "asked"
    (packed,) = folder.glob("indexes-*.tar.gz")
    shards = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.tar"))
    indexes = [name.replace(".tar", ".index.jsonl") for name in shards]
    alone = {"whole": [], "of another state": indexes[:1]}.get(bundle, indexes)
    if bundle == "of another state":  # it has the name of this one, and one index is not the one of corpus.json
        prepared = json.loads((folder / "corpus.json").read_text())
        split, name = shards[0].split("/")
        changed = folder / indexes[0]
        changed.write_text(changed.read_text().replace('"audio_crc32": ', '"audio_crc32": 1'))
        prepared["splits"][split]["files"][name]["index_crc32"] = zlib.crc32(changed.read_bytes())
        (folder / "corpus.json").write_text(json.dumps(prepared))
        packed = packed.rename(folder / bundle_name(Prepared.load(folder).files))
    elif bundle == "cut":
        packed.write_bytes(packed.read_bytes()[:400])
    elif bundle == "gone":
        packed.unlink()
    mirror(tmp_path / "copy", RemoteConfig(url=f"pipe:echo {{}} >>{log}; cat {folder}/{{}}"))
    asked = set(log.read_text().split())
    assert asked == {"corpus.json", packed.name, *alone}
    assert ("the indexes come one by one" in caplog.text) == (bundle in ("cut", "gone"))
    for name in indexes:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    for name in shards:
        assert (tmp_path / "copy" / name).read_bytes() == b""
    assert not list((tmp_path / "copy").rglob("indexes-*.gz"))


def test_a_corpus_that_changed_is_fetched_where_it_did(tmp_path: Path, published: tuple[str, Path]) -> None:
    url, folder = published
    copy, config = tmp_path / "copy", RemoteConfig(url=url)
    mirror(copy, config)
    names = sorted(p.name for p in (folder / "train").glob("*.tar"))
    assert sorted(p.name for p in (copy / "train").glob("*.tar")) == names
    for name in names:
        (copy / "train" / name).write_bytes(b"as if it had been fetched")
    prepared = json.loads((folder / "corpus.json").read_text())
    files = prepared["splits"]["train"]["files"]
    index = (folder / "train" / names[0]).with_suffix(".index.jsonl")
    index.write_text(index.read_text().replace('"audio_crc32": ', '"audio_crc32": 1'))
    files[names[0]]["index_crc32"] = zlib.crc32(index.read_bytes())
    del files[names[1]]
    prepared["splits"]["train"]["shards"] -= 1
    (folder / "corpus.json").write_text(json.dumps(prepared))
    mirror.cache_clear()
    mirror(copy, config)
    there = {p.name: p.stat().st_size for p in (copy / "train").glob("*.tar")}
    assert there == {names[0]: 0, **dict.fromkeys(names[2:], 25)}
    assert (copy / "train" / index.name).read_bytes() == index.read_bytes()
    assert not (copy / "train" / names[1]).with_suffix(".index.jsonl").exists()


def test_a_server_that_is_away_stops_nothing_that_is_here(
    tmp_path: Path, published: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    url, folder = published
    copy, config = tmp_path / "copy", RemoteConfig(url=url)
    mirror(copy, config)
    shutil.move(folder, folder.with_name(f"{folder.name}-away"))
    mirror.cache_clear()
    mirror(copy, config)
    assert "cannot be reached (HTTP 404 not found); the copy in" in caplog.text
    assert len(Index.load(copy / "train", 16000)) == 50
    with pytest.raises(UserError, match=r"corpus\.json: HTTP 404 not found; mend the URL"):
        mirror(tmp_path / "other", config)


def test_a_folder_is_the_copy_of_one_corpus(tmp_path: Path, corpus: Path, published: tuple[str, Path]) -> None:
    url, folder = published
    own = shutil.copytree(corpus, tmp_path / "own", ignore=shutil.ignore_patterns(".columns"))
    before = set(own.rglob("*"))
    with pytest.raises(UserError, match="holds a corpus of its own"):
        mirror(own, RemoteConfig(url=url))
    assert set(own.rglob("*")) == before, "nothing is left of what was refused"
    mirror(tmp_path / "copy", RemoteConfig(url=url))
    with pytest.raises(UserError, match="is the copy of http"):
        mirror(tmp_path / "copy", RemoteConfig(url="http://127.0.0.1:9/other"))
    with pytest.raises(UserError, match="prepared where it lies"):
        recipe.load("speech/tones", [f"data.path={tmp_path}/copy", f"data.remote.url={url}"]).prepare()
    (folder / "corpus.json").write_text((folder / "corpus.json").read_text().replace("shard-000003.tar", "../evil.tar"))
    with pytest.raises(UserError, match=r"'train/\.\./evil\.tar': is no name of a shard"):
        mirror(tmp_path / "evil", RemoteConfig(url=url))


def test_a_rank_may_come_while_another_makes_the_copy(
    tmp_path: Path, published: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the first has just opened a file for writing or put one in place, another finds its own copy there."""
    url, copy, seen = published[0], tmp_path / "copy", set()
    opened, replaced = Path.open, Path.replace

    def look(path: Path) -> None:
        if path.is_relative_to(copy):
            seen.add(path.name)
            _claim(copy, url)

    def open_and_look(path: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(path, *arguments, **options)
        if "w" in file.mode:
            look(path)
        return file

    def replace_and_look(path: Path, target: Path) -> Path:
        result = replaced(path, target)
        look(result)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_and_look)
        patch.setattr(Path, "replace", replace_and_look)
        mirror(copy, RemoteConfig(url=url))
    assert {"url", "corpus.json"} <= seen


def test_a_cache_smaller_than_two_windows_is_refused(tmp_path: Path, published: tuple[str, Path]) -> None:
    more = [f"data.remote.url={published[0]}", "data.remote.cache_gb=0.0005"]
    with pytest.raises(UserError, match=r"cache_gb = 0\.0005: two windows of plan\.window_shards = 3 shards take"):
        recipe.load("speech/tones", overrides(tmp_path / "copy", tmp_path, *more)).build_dataset("train")
