"""Russian sentences read by one man: the recordings behind Festival's voice `msu_ru_nsh_clunits`, 620 in 1.7 hours.

Debian ships them as the package `festvox-ru`. It is fetched with `apt-get download` and unpacked with `dpkg -x`, which
need no root and leave the system as it is; where there is no apt, the message says what to put where.
"""

import hashlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Literal

from trainer.config import Config, Free, show
from trainer.data.corpora.base import BadLinesError, Progress, Utterance
from trainer.errors import UserError

PACKAGE = "festvox-ru"
VERSION = "0.5+dfsg-6"
SHA256 = "21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4"
SIZE = 178_728_512
VOICE = Path("usr/share/festival/voices/russian/msu_ru_nsh_clunits")
TRANSCRIPTS = Path("etc/txt.done.data")

LINE = re.compile(r'\(\s*(\S+)\s+"(.*)"\s*\)')
STRESS = "+"  # before a stressed vowel, on some words only


class FestvoxRuConfig(Config):
    """The recordings of Debian's `festvox-ru`."""

    kind: Literal["festvox_ru"] = "festvox_ru"
    path: Free[Path | None] = None
    """Folder of the unpacked voice (with etc/ and wav/ in it, or usr/); null fetches it into `raw/` of data.path."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Fetch the voice, unless it is there, and read its list of sentences.

        Args:
            folder: of the prepared corpus; the download goes to `raw/` below it.
            progress: told the bytes of the download.

        Raises:
            UserError: it cannot be fetched (the message says how to do that by hand), or is not what it should be.
        """
        if self.path is None:
            voice = fetch(folder / "raw", progress)
        elif (found := find_voice(self.path)) is None:
            raise UserError(
                f"data.corpus.path = {self.path}: holds neither {TRANSCRIPTS} nor {VOICE / TRANSCRIPTS}; name the "
                f"folder where {PACKAGE} was unpacked, or leave the key out to fetch it"
            )
        else:
            voice = found
        return read_voice(voice)


def find_voice(folder: Path) -> Path | None:
    """The voice in a folder, which may be the voice itself or hold the package's tree."""
    for voice in (folder, folder / VOICE):
        if (voice / TRANSCRIPTS).is_file():
            return voice
    return None


def read_voice(voice: Path) -> list[Utterance]:
    """The sentences of an unpacked voice."""
    found: list[Utterance] = []
    problems: list[str] = []
    for number, line in enumerate((voice / TRANSCRIPTS).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{show(voice / TRANSCRIPTS)} line {number}"
        match = LINE.fullmatch(line.strip())
        if match is None:
            problems.append(f'{where}: {line.strip()[:60]!r}: wanted ( KEY "TEXT" ); mend the line or remove it')
            continue
        key, text = match.groups()
        audio = voice / "wav" / f"{key}.wav"
        if re.search(r"[./]", key):
            problems.append(f"{where}: key = {key!r}: holds a dot or a slash; rename it")
        elif not audio.is_file():
            problems.append(f"{where}: key {key}: {show(audio)}: there is no such file; unpack the package again")
        else:
            found.append(Utterance(key, text.replace(STRESS, ""), audio, None, where))
    if problems:
        raise BadLinesError(problems, found)
    return found


def fetch(raw: Path, progress: Progress) -> Path:
    """The voice below `raw`, after fetching and unpacking what is missing."""
    tree = raw / PACKAGE
    voice = find_voice(tree) or find_voice(raw)
    if voice is not None:
        return voice
    raw.mkdir(parents=True, exist_ok=True)
    archives = sorted(raw.glob(f"{PACKAGE}_*.deb"))
    archive = archives[-1] if archives else _download(raw, progress)
    _check(archive)
    return _unpack(archive, tree)


def _by_hand(raw: Path, reason: str) -> UserError:
    return UserError(
        f"data.corpus.kind = festvox_ru: {reason}\n"
        f"Fetch the Debian package {PACKAGE} elsewhere: on any Debian mirror it is "
        f"pool/main/f/{PACKAGE}/{PACKAGE}_{VERSION}_all.deb, {SIZE:,} bytes, SHA-256 {SHA256}.\n"
        f"Put the .deb into {show(raw)}/, or, where there is no dpkg either, what `ar x` and "
        f"`tar -xf data.tar.xz` make of it (the folder usr/) into {show(raw / PACKAGE)}/, and run the command again."
    )


def _check(archive: Path) -> None:
    """Compare the archive with the checksum known here, or with apt's own for another version.

    Raises:
        UserError: they differ.
    """
    version = archive.name.removeprefix(f"{PACKAGE}_").removesuffix("_all.deb").replace("%3a", ":")
    wanted: str | None = SHA256
    if version != VERSION:
        wanted = _record([], version).get("SHA256")
        source = "apt's record says" if wanted else "apt has no record of it, so its checksum was not looked at:"
        print(
            f"{archive.name}: version {version}, not {VERSION} as known here; {source} {wanted or ''}",
            flush=True,
        )
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if wanted is not None and digest.hexdigest() != wanted:
        raise UserError(
            f"{show(archive)}: SHA-256 {digest.hexdigest()}, wanted {wanted}: it is damaged or another file; delete it "
            "and run the command again"
        )


def _unpack(archive: Path, tree: Path) -> Path:
    partial = tree.with_name(f"{tree.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    print(f"{archive.name}: unpacking", flush=True)
    if shutil.which("dpkg") is None:
        raise _by_hand(archive.parent, "there is no dpkg here to unpack it with.")
    done = subprocess.run(["dpkg", "-x", archive, partial], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        raise _by_hand(archive.parent, f"dpkg -x {archive.name} failed: {_last_line(done.stderr)}")
    partial.replace(tree)
    voice = find_voice(tree)
    if voice is None:
        raise UserError(f"{show(archive)}: holds no {VOICE / TRANSCRIPTS}; delete it and run the command again")
    return voice


def _download(raw: Path, progress: Progress) -> Path:
    """`apt-get download`, with the system's package lists, or after an update into lists of our own."""
    if shutil.which("apt-get") is None:
        raise _by_hand(raw, f"there is no apt-get here to fetch {PACKAGE} with.")
    partial = raw / "download.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "deb").mkdir(parents=True)
    try:
        # As root, apt would go over to a user that may not write here, and complain.
        options = [
            "-o",
            "APT::Sandbox::User=root",
            "-o",
            "Acquire::Retries=1",
            "-o",
            "Acquire::http::Timeout=30",
        ]
        error = "apt knows no such package"
        if _record(options):
            error = _get(options, partial / "deb", progress)
        if error:  # no lists, or old ones that name a file which is gone
            options += _private_lists(partial / "apt")
            print(f"{PACKAGE}: reading the package lists", flush=True)
            updated = subprocess.run(["apt-get", *options, "-q", "update"], capture_output=True, text=True)
            if _record(options):
                error = _get(options, partial / "deb", progress)
            elif updated.returncode:
                error = f"apt-get update: {_last_line(updated.stderr)}"
        if error:
            raise _by_hand(raw, f"apt-get could not fetch {PACKAGE}: {error}")
        archive = next((partial / "deb").glob("*.deb"))
        _check(archive)
        return archive.replace(raw / archive.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _private_lists(folder: Path) -> list[str]:
    """Options that let apt use the system's sources and keys, but keep lists and caches in `folder`."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    folder = folder.resolve()
    settings = {
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "none",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _record(options: list[str], version: str = "") -> dict[str, str]:
    """What apt knows of the package: {field: value}, empty if nothing."""
    if shutil.which("apt-cache") is None:
        return {}
    name = f"{PACKAGE}={version}" if version else PACKAGE
    command = ["apt-cache", *options, "--no-all-versions", "show", name]
    answer = subprocess.run(command, capture_output=True, text=True)
    pairs = (line.split(": ", 1) for line in answer.stdout.splitlines() if ": " in line and line[0] != " ")
    return {pair[0]: pair[1] for pair in pairs} if not answer.returncode else {}


def _get(options: list[str], folder: Path, progress: Progress) -> str:
    """Run `apt-get download` in a folder; returns what went wrong, or nothing."""
    size = int(_record(options).get("Size", SIZE))
    command = ["apt-get", *options, "-q", "download", PACKAGE]
    log = folder / "apt.log"
    environment = os.environ | {"LC_ALL": "C"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                done = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                progress(f"fetching {PACKAGE} (bytes)", min(done, size), size)
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode == 0 and any(folder.glob("*.deb")):
        progress(f"fetching {PACKAGE} (bytes)", size, size)
        return ""
    return _last_line(log.read_text(errors="replace"))


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("E:")] or text.splitlines() or ["no message"]
    return errors[-1]
