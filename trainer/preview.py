"""Some samples of shards as one HTML page that needs nothing else: to listen and read before training.

Everything that comes from the data (names, keys, texts) is escaped: a transcript is never markup.
"""

import tempfile
from pathlib import Path

import torch

from trainer import keyed
from trainer.config import show
from trainer.data.audio import AudioError, decode_matrix
from trainer.data.dataset import Media
from trainer.data.examine import find_shards, read_sound
from trainer.data.lint import as_prepared, prepared_at
from trainer.data.prepared import SpeechDataConfig
from trainer.data.tars import Pair, read_contents, transcript
from trainer.errors import UserError
from trainer.page import escape, sound, write_page
from trainer.plots import heat_map


def write(path: Path, page: Path, count: int, config: SpeechDataConfig) -> int:
    """Write the page.

    Args:
        path: a tar, or a folder of them.
        page: the file.
        count: most samples on it, spread over all shards; the same ones each time.
        config: features of the pictures, if no `corpus.json` in the folder says.

    Returns:
        the samples on it.

    Raises:
        UserError: no shards, or the page cannot be written.
    """
    config = as_prepared(config, prepared_at(path))
    shards = list(dict.fromkeys(shard.resolve() for shard in find_shards(path)))
    # Reading the headers of many thousand tars would take long; the samples of one in a row sound alike.
    chosen = sorted(shards, key=lambda shard: keyed.key("preview", shard.name))[: max(count, 1)]
    pairs: list[tuple[Path, Pair]] = []
    problems: list[str] = []
    for shard in sorted(chosen):
        try:
            contents = read_contents(shard, config.features.kind)
        except OSError as error:
            problems.append(f"{show(shard)}: cannot be read: {error.strerror}")
            continue
        problems += [f"{show(shard)}: {p.key} {p.check}: {p.detail}" for p in contents.problems]
        pairs += [(shard, pair) for pair in contents.pairs]
    pairs = sorted(pairs, key=lambda found: keyed.key("preview", found[0].name, found[1].key))[:count]
    with tempfile.TemporaryDirectory() as folder:
        samples = "".join(_sample(*found, config, Path(folder) / "picture.png") for found in pairs)
    lines = "".join(f"<li>{escape(text)}</li>" for text in problems[:50])
    note = f"<h2>What is wrong with these shards</h2><ul>{lines}</ul>" if lines else ""
    head = f"<p>{len(pairs)} samples of {len(chosen)} of {len(shards)} shards</p>"
    try:
        write_page(page, path.name, head + samples + note)
    except OSError as error:
        raise UserError(f"--page {page}: cannot be written: {error.strerror}; name another file") from error
    return len(pairs)


def _sample(shard: Path, pair: Pair, config: SpeechDataConfig, picture: Path) -> str:
    with shard.open("rb") as file:
        file.seek(pair.text.offset)
        content = file.read(pair.text.size)
        file.seek(pair.audio.offset)
        audio = file.read(pair.audio.size)
    try:
        text = transcript(content)
    except UnicodeDecodeError:
        text = content.decode("utf-8", "replace")
    parts = [f"<p><span class=key>{escape(pair.key)}</span> <small>{escape(show(shard))}</small></p>"]
    parts.append(f"<p>{escape(text)}</p>")
    try:
        if config.features.kind == "precomputed":
            features, rate = decode_matrix(audio, config.features.num_bands), config.rate_hz
            parts.append(f"<p><small>{len(features) / rate:.2f} s, {rate} rows a second</small></p>")
        else:
            samples, length, rate, channels = read_sound(audio)
            mono = samples.mean(1) if channels > 1 else samples
            features = config.features.build(rate).energies(torch.from_numpy(mono)).numpy()
            more = f", {channels} channels" if channels > 1 else ""
            parts.append(f"<p><small>{length / rate:.2f} s, {rate} Hz{more}, {escape(pair.audio.ending)}</small></p>")
            parts.append(sound(Media(mono, rate)))
        parts.append(heat_map(Media(image=features.T), picture))
    except (AudioError, UserError) as error:
        parts.append(f"<p><small>no sound: {escape(error)}</small></p>")
    return f"<div class=sample>{''.join(parts)}</div>"
