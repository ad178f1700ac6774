import os
import subprocess

from baton.process import ProcessIdentity


def test_a_process_is_alive_until_it_is_reaped_or_a_zombie() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        identity = ProcessIdentity.of(child.pid)
        assert identity is not None and identity.is_alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not identity.is_alive, "a zombie writes no more"
    assert not identity.is_alive


def test_another_process_under_the_same_id_is_another() -> None:
    own = ProcessIdentity.own()
    assert own.is_alive
    assert not ProcessIdentity(own.pid, own.started_ticks + 1).is_alive
