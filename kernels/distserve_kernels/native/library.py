"""Compile the C++ of this folder once for this processor, and load it.

The result is kept in a cache folder under a name that is a digest of sources, flags, compiler and processor: whoever
finds it there may load it. Of several processes one compiles, the others wait for its lock; a file of that name is
always whole. Nothing here is needed to serve: whoever gets NativeUnavailable goes on in torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock

from distserve_kernels.native.abi import bind

SOURCE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
BUILD_TIMEOUT_S = 300.0
_COMPILERS = ("c++", "g++", "clang++")


class NativeUnavailable(Exception):
    """Native kernels cannot be used here; the text says why, as the end of a sentence."""


def load(cache: Path, say: Callable[[str], None] | None = None, flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """The library, compiled into ``cache`` if it is not there yet. ``say`` gets one line when that starts.

    Raises NativeUnavailable.
    """
    compiler = find_compiler()
    path = cache / f"distserve-{_digest(compiler, flags)}.so"
    try:
        if not path.is_file():
            _build_once(compiler, flags, path, say)
        return bind(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} cannot be made or loaded ({error})") from error


def available(cache: Path, say: Callable[[str], None]) -> ctypes.CDLL | None:
    """The library, or None with a line that says why there is none."""
    try:
        return load(cache, say)
    except NativeUnavailable as why:
        say(f"no native copies: {why}")
        return None


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, else the first that is installed."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise NativeUnavailable(f"CXX names {chosen[0]}, which is not installed")
        return tuple(chosen)
    for name in _COMPILERS:
        if found := shutil.which(name):
            return (found,)
    raise NativeUnavailable("no C++ compiler is installed (install g++)")


def _build_once(compiler: Sequence[str], flags: Sequence[str], path: Path, say: Callable[[str], None] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{path}.lock", timeout=BUILD_TIMEOUT_S, poll_interval=0.1):
            if not path.is_file():
                if say is not None:
                    say(f"compiling native kernels into {path.parent} (once, some ten seconds)")
                _build(compiler, flags, path)
    except filelock.Timeout as error:
        raise NativeUnavailable(f"another process has been compiling for {BUILD_TIMEOUT_S:.0f} s") from error


def _build(compiler: Sequence[str], flags: Sequence[str], path: Path) -> None:
    """Compile beside ``path`` and rename; the lock is ours, so what lies half made there was left by the dead."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        command = [*compiler, *flags, *map(str, sorted(SOURCE.glob("*.cpp"))), "-o", scratch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise NativeUnavailable(f"{compiler[0]} failed: {_first_error(done.stderr)}")
        os.chmod(scratch, 0o755)
        os.replace(scratch, path)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{compiler[0]} took over {BUILD_TIMEOUT_S:.0f} s") from error
    finally:
        Path(scratch).unlink(missing_ok=True)


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines() or ["it said nothing"]
    return lines[0].strip()


def _digest(compiler: Sequence[str], flags: Sequence[str]) -> str:
    """Of all that the result depends on."""
    digest = hashlib.blake2b(digest_size=10)
    for path in sorted((*SOURCE.glob("*.h"), *SOURCE.glob("*.cpp"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((tuple(compiler), _version(compiler), tuple(flags), _processor())).encode())
    return digest.hexdigest()


def _version(compiler: Sequence[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler[0]} does not run ({error})") from error
    return done.stdout


def _processor() -> tuple[str, ...]:
    """What ``-march=native`` looks at: the architecture and the processor's features."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return (platform.machine(), platform.processor())
    return (platform.machine(), *(line for line in lines if line.startswith(wanted)))
