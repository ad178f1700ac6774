from pathlib import Path

import baton.rpc
from baton.rpc.generate import generate


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    (committed,) = map(Path, baton.rpc.__path__)
    made = {path.name: path.read_text() for path in generate(tmp_path)}
    kept = {path.name: path.read_text() for path in committed.glob("*_pb2*")}
    assert made == kept, "proto/ changed: run `make proto`"
