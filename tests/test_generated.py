"""The committed code for the wire is what the .proto files give today."""

from tools import gen_protos


def test_generated_code_is_fresh() -> None:
    assert gen_protos.stale_files() == [], "run: make gen"
