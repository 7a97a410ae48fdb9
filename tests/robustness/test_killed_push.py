"""After kill -9 at any moment of a push, the folder is whole, the Hub has the old or the new model, and it continues.

The moments are the requests that reach a stand-in of the Hub over HTTP: before one is read, or before it is answered.
"""

import os
import random
import signal

import pytest
from helpers import fresh
from helpers.hub_standin import WRITE_TOKEN, Repo, environment_of, serve
from helpers.marks import slow
from helpers.runs import digest
from helpers.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in two shards to push, and the model that is in the repository before."""
    folder = tmp_path_factory.mktemp("killed_push")
    tiny_llama(seed=0).save_pretrained(folder / "before")
    tiny_llama(seed=1).save_pretrained(folder / "now", max_shard_size="20KB")
    return folder


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


class Push:
    """A push to a stand-in, in a process that is killed at the event with a given number."""

    def __init__(self, hub, folder, kill_at=0):
        self.hub, self.folder, self.kill_at, self.events = hub, folder, kill_at, 0
        self.pid = 0

    def code(self) -> int:
        self.hub.on_event = self._event
        environment = environment_of(self.hub, self.folder / "home", WRITE_TOKEN)
        self.pid = fresh.start(["-m", "hf_dms", "push", str(self.folder / "now"), "tester/model"], env=environment)
        return fresh.wait()

    def _event(self, event: str) -> None:
        self.events += 1
        if self.events == self.kill_at:
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def num_events(folder):
    """Events of an uninterrupted push over the model before."""
    with serve() as hub:
        hub.repos["tester/model"] = Repo(False, {"1" * 40: contents(folder / "before")}, {"main": "1" * 40})
        push = Push(hub, folder)
        assert push.code() == 0
    return push.events


@pytest.mark.parametrize(
    "there", [pytest.param(False, marks=pytest.mark.slow), True]
)  # whether there is an earlier model in the repository
@pytest.mark.parametrize("seed", slow(*range(8)))
def test_a_killed_push_leaves_nothing_broken_and_goes_on(folder, num_events, seed, there):
    local = digest(folder / "now")
    before, now = contents(folder / "before"), contents(folder / "now")
    with serve() as hub:
        if there:
            hub.repos["tester/model"] = Repo(False, {"1" * 40: before}, {"main": "1" * 40})
        at = random.Random(seed).randint(1, num_events - 2)
        assert Push(hub, folder, at).code() == -signal.SIGKILL
        assert digest(folder / "now") == local
        whole = [before, now] if there else [{".gitattributes": b""}, now | {".gitattributes": b""}, None]
        assert (hub.files("tester/model") if "tester/model" in hub.repos else None) in whole
        assert Push(hub, folder).code() == 0
        assert {name: data for name, data in hub.files("tester/model").items() if name != ".gitattributes"} == now
        sent = [path for method, path in hub.requests if method == "PUT"]
        assert sorted(set(sent)) == sorted(f"/lfs/{sha}" for name, sha in local.items() if name.endswith("tensors"))
    assert digest(folder / "now") == local
