"""Properties of claims, between processes."""

import subprocess
import sys
from pathlib import Path

from autocompress.optimize.claims import Claims

HOLD = """
import sys
from pathlib import Path
from autocompress.optimize.claims import Claims
claims = Claims(Path(sys.argv[1]))
print(claims.claim("key", {"width:conv": 8}), flush=True)
sys.stdin.readline()
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    """Another process, which has claimed `key` when this returns."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_what_another_process_claimed_is_not_mine_until_it_lets_go(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    other = holder(tmp_path)
    assert not claims.claim("key", {})
    assert claims.of_others() == {"key": {"width:conv": 8}}
    assert claims.claim("another", {})
    other.communicate("\n", timeout=30)
    assert claims.of_others() == {}
    assert claims.claim("key", {})


def test_the_claim_of_a_killed_process_is_void_at_once(tmp_path: Path) -> None:
    other = holder(tmp_path)
    other.kill()
    other.communicate(timeout=30)
    assert (tmp_path / "key").exists()
    claims = Claims(tmp_path)
    assert claims.of_others() == {}
    assert not (tmp_path / "key").exists()


def test_claims_of_one_s_own_are_not_of_others_and_end_with_release(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.claim("key", {"a": 1})
    assert claims.claim("key", {"a": 1})
    assert claims.of_others() == {}
    claims.release("key")
    claims.release("key")
    assert list(tmp_path.iterdir()) == []
    claims.claim("one", {})
    claims.close()
    assert list(tmp_path.iterdir()) == []
