"""Makes etcd_pb2.py from etcd.proto: `python -m tests.bench.etcd`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROTO = Path(__file__).resolve().with_name("etcd.proto")
GENERATED = ("etcd_pb2.py", "etcd_pb2.pyi")


def generate(out: Path) -> None:
    """Run protoc; what it makes lands below `out`, under the path of this package."""
    # The mypy plug-in is found by name on PATH, beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    outputs = [f"--{kind}_out={out}" for kind in ("python", "mypy")]
    source = PROTO.relative_to(ROOT).as_posix()
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, source],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        check=True,
    )


def stale_files() -> list[str]:
    """Names of committed files that are not what protoc makes now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = Path(folder) / PROTO.parent.relative_to(ROOT)
        return [
            name
            for name in GENERATED
            if (made / name).read_bytes() != PROTO.with_name(name).read_bytes()
        ]


if __name__ == "__main__":
    generate(ROOT)
