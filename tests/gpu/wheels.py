"""The stack for a machine with PyTorch and without a network, as wheels in parcels.

    python -m tests.gpu.wheels collect FOLDER        # where there is a network
    python3 tests/gpu/wheels.py install FOLDER       # there; makes .venv

Torch-free, and of the standard library alone: it runs where nothing is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = ROOT / "launch" / "executors" / "image.txt"
"""Everything but torch, for Python 3.12."""
TESTS = ("pytest", "pytest-timeout", "iniconfig", "pluggy")
"""Needed besides, in the versions that are installed here."""
LEFT_OUT = {
    "lm-eval", "nncf", "openvino", "openvino-genai", "openvino-telemetry",
    "openvino-tokenizers", "optimum", "optimum-intel", "ray", "wandb",
}  # fmt: skip
"""Engines for CPUs, benchmarks and a tracker, which no step uses."""
PARCEL_BYTES = 60 * 10**6
CONTENTS = "contents.json"
"""In the folder: what is in each parcel, with sizes and hashes."""
LINUX = (17, 24, 27, 28, 31, 34, 35, 39)
"""Minor versions of glibc that wheels are made for."""
Parcels = list[dict[str, int]]


def pins() -> list[str]:
    """What is carried."""
    lines = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    from importlib.metadata import version

    wanted = [line for line in lines if line.partition("==")[0] not in LEFT_OUT]
    return [*wanted, *(f"{name}=={version(name)}" for name in TESTS)]


def collect(folder: Path, python: str) -> None:
    """Downloads wheels, makes those that only have sources, and packs them into parcels."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wheels = Path(temporary)
        _download(pins(), wheels, python)
        sources = [path for path in wheels.iterdir() if path.suffix != ".whl"]
        for source in sources:
            _pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(source))
            source.unlink()
        for wheel in wheels.glob("*-linux_*.whl"):
            raise SystemExit(f"{wheel.name} was compiled here, for this Python alone")
        pack(sorted(wheels.iterdir()), folder)


def _download(wanted: Sequence[str], wheels: Path, python: str) -> None:
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in LINUX]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    pairs = [argument for name in platforms for argument in ("--platform", name)]
    version = ["--python-version", python, "--implementation", "cp"]
    _pip("download", "--quiet", "--no-deps", "--dest", str(wheels), *version, *pairs, *wanted)


def _pip(*arguments: str, python: str = sys.executable) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def pieces(sizes: Mapping[str, int], limit: int = PARCEL_BYTES) -> Iterator[tuple[str, int, int]]:
    """Files, those above the limit in several pieces: name, where a piece begins, its size."""
    for name, size in sizes.items():
        for start in range(0, size, limit):
            yield name, start, min(limit, size - start)


def parcels(found: Iterable[tuple[str, int, int]], limit: int = PARCEL_BYTES) -> Parcels:
    """Pieces by parcel, none above the limit: the largest first, each where there is room."""
    made: Parcels = []
    for name, start, size in sorted(found, key=lambda piece: -piece[2]):
        room = (parcel for parcel in made if sum(parcel.values()) + size <= limit)
        parcel = next(room, None)
        if parcel is None:
            made.append(parcel := {})
        parcel[f"{name}@{start}"] = size
    return made


def pack(files: Sequence[Path], folder: Path, limit: int = PARCEL_BYTES) -> None:
    """Writes parcels ``1``, ``2``, … and their contents."""
    made = parcels(pieces({file.name: file.stat().st_size for file in files}, limit), limit)
    where = {file.name: file for file in files}
    for number, parcel in enumerate(made, 1):
        (folder / f"{number}").mkdir(parents=True)
        for piece, size in parcel.items():
            name, _, start = piece.rpartition("@")
            with where[name].open("rb") as source:
                source.seek(int(start))
                (folder / f"{number}" / piece).write_bytes(source.read(size))
        print(f"parcel {number}: {sum(parcel.values()) / 1e6:.1f} MB, {len(parcel)} file(s)")
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / CONTENTS).write_text(json.dumps({"parcels": made, "sha256": hashes}, indent=1))


def unpack(folder: Path, wheels: Path) -> None:
    """Puts wheels together again.

    Raises:
        SystemExit: One is not whole.
    """
    contents = json.loads((folder / CONTENTS).read_text())
    for name, expected in contents["sha256"].items():
        found = sorted(folder.glob(f"*/{name}@*"), key=lambda p: int(p.name.rpartition("@")[2]))
        with (wheels / name).open("wb") as file:
            for piece in found:
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, file)
        if hashlib.sha256((wheels / name).read_bytes()).hexdigest() != expected:
            raise SystemExit(f"{name} is not whole: carry every parcel of {folder / CONTENTS}")


def install(folder: Path, environment: Path) -> None:
    """Makes a virtual environment of the wheels, and of the PyTorch of the Python that this is.

    By a path, since that Python may itself be a virtual environment's, which another does not see.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(f"{sys.executable} has no torch: start this with the Python that has it")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    with tempfile.TemporaryDirectory() as temporary:
        unpack(folder, Path(temporary))
        files = sorted(map(str, Path(temporary).iterdir()))
        _pip(
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            *files,
            python=str(python),
        )
    [packages] = (environment / "lib").glob("python3*/site-packages")
    (packages / "machine.pth").write_text(f"{Path(spec.origin).parents[1]}\n")
    os.execv(
        python, [str(python), "-c", "import torch; print('installed beside', torch.__version__)"]
    )


def main() -> None:
    """Collects or installs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["collect", "install"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine without a network")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv")
    args = parser.parse_args()
    if args.what == "collect":
        args.folder.mkdir(parents=True, exist_ok=False)
        collect(args.folder.resolve(), args.python)
    else:
        install(args.folder, args.environment)


if __name__ == "__main__":
    main()
