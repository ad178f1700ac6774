import subprocess
import sys
from pathlib import Path

import baton.rpc


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    """In a process of its own: protoc's library and NIXL's, which other tests load, do not go together in one."""
    subprocess.run([sys.executable, "-m", "baton.rpc.generate", str(tmp_path)], check=True, capture_output=True)
    (committed,) = map(Path, baton.rpc.__path__)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in committed.glob("*_pb2*")}
    assert made == kept, "proto/ changed: run `make proto`"
