"""Makes the Python code for the wire from the .proto files, or checks that it is fresh.

Rules: the folder under protos/ is the import path, so protoc's imports are right as written and
nothing is rewritten. The result is committed: a clone tests at once, and a change of the wire
shows in review.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = "grafos_proto/v1"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Run protoc over every .proto file; what it makes lands below `out`."""
    sources = sorted(
        path.relative_to(PROTOS).as_posix() for path in PROTOS.glob(f"{PACKAGE}/*.proto")
    )
    if not sources:
        sys.exit(f"no .proto file below protos/{PACKAGE}")
    include = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # The mypy plug-ins are found by name on PATH, beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"-I{include}", *outputs, *sources],
        cwd=PROTOS,
        env={**os.environ, "PATH": path},
        check=True,
    )


def generated_files(root: Path) -> dict[str, bytes]:
    """Every generated file below a folder, by its path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for pattern in GENERATED
        for path in (root / PACKAGE).glob(pattern)
    }


def stale_files() -> list[str]:
    """Paths whose committed text is not what protoc makes now, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = generated_files(Path(folder))
    committed = generated_files(PROTOS)
    return sorted(
        path for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where stale")
    if not parser.parse_args().check:
        generate(PROTOS)
        return 0
    stale = stale_files()
    for path in stale:
        print(f"protos/{path} is not what the .proto gives; run: make gen", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
