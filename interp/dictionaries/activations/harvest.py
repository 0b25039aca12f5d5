"""`harvest`: activations written to disk once, for many dictionaries."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from interp.dictionaries.activations.batches import Contexts, Source, State, check_settings
from interp.dictionaries.activations.manifest import NAME, Manifest, Piece
from interp.dictionaries.activations.shard import DTYPES, tokens_of, write_shard
from interp.dictionaries.activations.store import ActivationStore
from interp.errors import FileError, InputError, SettingsError, unknown
from interp.files import sha256

Keep = Literal["contexts", "rows"]


def harvest(
    source: Source[Contexts],
    folder: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    dtype: str = "float16",
    keep: Keep = "contexts",
    shard_tokens: int = 65_536,
    progress: Callable[[int], None] | None = None,
) -> ActivationStore:
    """Write the activations of a source to a folder: shards of safetensors, and a manifest with their hashes.

    It begins where the source stands. Called again with the same settings it goes on where it was stopped, whenever
    that was: finished shards are checked against their hashes and kept, missing ones are made anew, and a greater
    `tokens` adds to them. After an error the source stands where the last finished shard ends. A process of several
    (`world` of the stream) writes to a folder of its own below `folder`; `ActivationStore(folder)` reads all of them.

    Args:
        source: a stream, best behind a `Prefetch`.
        folder: where; made if it is not there.
        tokens: how many tokens to use at least; None for all of the corpus.
        dtype: `float16`, `bfloat16` or `float32`.
        keep: `contexts` keeps every real token, so that contexts can be read whole (Lorsa); `rows` only those to use.
        shard_tokens: tokens to use in each shard, at least.
        progress: called after each pass of the model with the tokens to use so far.

    Returns:
        The store.

    Raises:
        SettingsError: an option is out of its range, the folder holds a store of other settings, or float16 is too
            small for an activation.
        FileError: the folder holds something else, a finished shard is damaged, or a file cannot be written.
        InputError: the source has no tokens.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if keep not in get_args(Keep):
        raise unknown("keep", keep, get_args(Keep))
    if shard_tokens < 1 or (tokens is not None and tokens < 1):
        raise SettingsError(f"tokens and shard_tokens are at least 1; found {tokens=}, {shard_tokens=}.")
    if tokens is None and source.settings.get("epochs", 1) is None:
        raise SettingsError("the source never ends (epochs=None): say how many tokens= to harvest.")
    world = source.settings.get("world", 1)
    own = Path(folder) / (f"rank-{source.settings['rank']}-of-{world}" if world > 1 else "")
    plan = Manifest(source.settings, dtype, keep, shard_tokens, dict(source.d_in), after=source.state().values)
    manifest = _begun(own, plan)
    for i in manifest.check(own, hashes=True):
        old = manifest.pieces[i]
        source.restore(State(old.begin))
        manifest.pieces[i] = _shard(source, own / old.file, manifest, None, old.contexts, lambda used: None) or old
        manifest.write(own)
    source.restore(State(manifest.after))
    while not manifest.ended and (tokens is None or manifest.used < tokens):
        done = manifest.used
        most = shard_tokens if tokens is None else min(shard_tokens, tokens - done)

        def report(used: int, done: int = done) -> None:
            if progress is not None:
                progress(done + used)

        piece = _shard(source, own / f"shard-{len(manifest.pieces):05d}.safetensors", manifest, most, None, report)
        if piece is None:
            manifest.ended = True
        else:
            manifest.pieces.append(piece)
            manifest.after = source.state().values
        manifest.write(own)
    if not manifest.used:
        raise InputError(f"nothing was harvested to {own}: the source has no tokens to use.")
    return ActivationStore(own)


def _begun(folder: Path, plan: Manifest) -> Manifest:
    """The manifest of a folder that a harvest was begun in, or a new one in an empty folder."""
    if (folder / NAME).exists():
        held = Manifest.read(folder)
        check_settings(held.plan, plan.plan, f"the store {folder}")
        return held
    if folder.exists() and (not folder.is_dir() or any(not _unfinished(p) for p in folder.iterdir())):
        raise FileError(f"{folder} is not empty and holds no {NAME}: choose another folder.")
    plan.write(folder)
    return plan


def _unfinished(path: Path) -> bool:
    """Whether a file is what a harvest leaves that was killed before its first manifest."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _shard(
    source: Source[Contexts],
    path: Path,
    manifest: Manifest,
    most: int | None,
    contexts: int | None,
    report: Callable[[int], None],
) -> Piece | None:
    """Write one shard of so many tokens or contexts from where the source stands; None where it has ended."""
    begin = source.state().values
    parts, used, count = [], 0, 0
    try:
        while (most is None or used < most) and (contexts is None or count < contexts):
            item = next(source, None)
            if item is None:
                break
            parts.append(tokens_of(item, DTYPES[manifest.dtype], manifest.keep == "contexts"))
            used += int(parts[-1]["use"].sum())
            count += len(item)
            report(used)
        if not parts:
            return None
        write_shard(path, parts)
    except BaseException:
        source.restore(State(begin))
        raise
    total = sum(len(p["use"]) for p in parts)
    return Piece(path.name, sha256(path), path.stat().st_size, count, total, used, begin)
