"""Many nodes: the hostfile, and how nodes that were started by hand keep step.

Over ssh, the pipeline runs on the first node alone, and DeepSpeed's launcher reaches the others.
Without ssh (`--no_ssh`), the same command runs on every node, with its own `--node_rank`. Node 0
(`FirstNode`) does all the work of one process and the bookkeeping. The others (`OtherNode`) start
their launcher when it says so. They tell each other by small JSON files in `OUTPUT_DIR/nodes/`,
which must be one folder for all nodes, as it must be for checkpoints:

- `first.json`: a token of this start, the tokens of the other nodes, and the current turn: what to
  launch, on which port, and the digests of what the step reads; or the end, with an exit code.
- `node-R.json`: the token of node R and that of the first node it answers, a digest of its plan,
  and the last turn that it has ended, with an exit code.

Tokens are new at every start and both sides repeat the other's, so no node takes the file of an
earlier run for an answer. The first node renews its file while it lives.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError, StopRequested
from preprocess.files import atomic_write_json
from preprocess.identity import digest
from train.config import PipelineConfig
from train.recipes.steps import Step

POLL_SECONDS = 0.3
BEAT_SECONDS = 10.0  # between two renewals of `first.json`
# A node waits as long for the others to be started by hand as DeepSpeed's ranks do for each other.
JOIN_SECONDS = 600.0
LOST_SECONDS = 180.0  # a first node that has been silent for so long is dead; NFS may lag by 60
SHARED_DISK_SECONDS = 90.0
SSH_SECONDS = 10
EXAMPLE = "write one line per node, as `node1 slots=8`"


# ------------------------------------------------------------------------------------ hostfile


def read_hostfile(path: str) -> dict[str, int]:
    """Return host -> ranks, in the order of the file, as DeepSpeed's launcher reads it.

    Raises:
        ConfigError: no such file, no node in it, a line of another form, a node named twice, or
            nodes of different size (DeepSpeed would give the ranks wrong devices).
    """
    if not Path(path).is_file():
        raise ConfigError(f"--hostfile {path}: no such file; {EXAMPLE}")
    hosts: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", words)
        if found is None:
            raise ConfigError(f"--hostfile {path}, line {number}: {words!r}; {EXAMPLE}")
        if found[1] in hosts:
            raise ConfigError(f"--hostfile {path}, line {number}: {found[1]} is there twice; give "
                              "each node one line with all its slots")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"--hostfile {path}: names no node; {EXAMPLE}")
    if len(set(hosts.values())) > 1:
        sizes = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
        raise ConfigError(f"--hostfile {path}: nodes have different numbers of slots ({sizes}); "
                          "give every node the same number")
    return hosts


def check_nodes(options: PipelineConfig, hosts: dict[str, int], steps: list[Step]) -> None:
    """Check that the nodes of the hostfile can be reached.

    Raises:
        ConfigError: a node rank that is not in it; a node that does not answer; a word that the
            shell of another node would change.
    """
    if not hosts:
        return
    if options.no_ssh:
        rank, first = options.node_rank, first_address(options)
        if rank is None or not 0 <= rank < len(hosts):
            raise ConfigError(f"--node_rank {rank}: --hostfile {options.hostfile} has "
                              f"{len(hosts)} nodes; give 0 to {len(hosts) - 1}")
        try:
            socket.getaddrinfo(first, None)
        except OSError:
            raise ConfigError(f"--master_addr {first}: no host of this name is known here; give "
                              "the address at which the other nodes reach the first") from None
        return
    for program in ("ssh", "pdsh"):
        if not shutil.which(program):
            raise ConfigError(f"--hostfile {options.hostfile}: {program} is not installed, by "
                              "which DeepSpeed reaches the nodes; install it, or add --no_ssh and "
                              "start the command on every node")
    for step in steps:
        odd = [word for word in step.command if step.launched and re.search(r"[^\w\s@%+=:,./#^-]",
                                                                            word)]
        if odd:
            raise ConfigError(f"step {step.name}: {odd[0]!r} passes through a shell on the other "
                              "nodes; rename it without special characters, or add --no_ssh")
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = dict(zip(hosts, pool.map(_answers, hosts), strict=True))
    silent = [host for host, answered in answers.items() if not answered]
    if silent:
        raise ConfigError(f"--hostfile {options.hostfile}: {', '.join(silent)} cannot be reached "
                          f"by ssh without a password; try `ssh {silent[0]} hostname`, or add "
                          "--no_ssh and start the command on every node")


def _answers(host: str) -> bool:
    """Return whether a node lets us in; DeepSpeed would try the first one only."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", host, "true"]
    try:
        return not subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                                  timeout=3 * SSH_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return False


def first_address(options: PipelineConfig) -> str:
    """Return the address of the first node: as given, else as the hostfile names it."""
    return options.master_addr or next(iter(read_hostfile(options.hostfile)))


# ----------------------------------------------------------------------------- started by hand


def plan_digest(steps: list[Step]) -> str:
    """Return what must be the same on every node: the steps and their commands."""
    return digest([[step.name, *step.command[1:]] for step in steps])


def _read(path: Path) -> dict[str, Any]:
    """Read what another node has written; {} while it is not there, or is being replaced."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


class FirstNode:
    """The first node's side; a context manager, which tells the others how the run has ended.

    Args:
        root: the pipeline's output folder.
        others: number of the other nodes.
        steps: the plan, which must be the same on all nodes.
    """

    def __init__(self, root: Path, others: int, steps: list[Step]) -> None:
        self.folder, self.plan = root / "nodes", plan_digest(steps)
        self._others = range(1, others + 1)
        self._told: dict[str, Any] = {"token": secrets.token_hex(8), "members": {}, "turn": 0,
                                      "beat": 0}
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> FirstNode:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tell()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        try:
            self._wait_for_members()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        code = getattr(error, "exit_code", 1 if error else 0)
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        self._closed.set()
        self._beating.join()
        with suppress(OSError):
            self._tell(end=code)

    def _tell(self, **news: Any) -> None:
        with self._lock:
            self._told |= news
            atomic_write_json(self.folder / "first.json", self._told)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            with suppress(OSError):  # a full disk is reported by the work itself
                self._tell(beat=self._told["beat"] + 1)

    def _member(self, rank: int) -> dict[str, Any]:
        said = _read(self.folder / f"node-{rank}.json")
        return said if said.get("answers") == self._told["token"] else {}

    def _wait_for_members(self) -> None:
        begin = spoke = time.monotonic()
        while True:
            found = {rank: said for rank in self._others if (said := self._member(rank))}
            members = {str(rank): said["token"] for rank, said in found.items()}
            if members != self._told["members"]:  # at once, so that they hear of an early end
                self._tell(members=members)
            now, missing = time.monotonic(), sorted(set(self._others) - set(found))
            if not missing or now - begin > JOIN_SECONDS:
                break
            if spoke == begin or now - spoke > BEAT_SECONDS:
                print(f"waiting for the same command with --node_rank {_list(missing)}", flush=True)
                spoke = now
            time.sleep(POLL_SECONDS)
        if missing:
            raise ConfigError(f"--node_rank {_list(missing)} was not started within "
                              f"{JOIN_SECONDS / 60:.0f} minutes; type the same command on every "
                              "node, with its own number")
        odd = [rank for rank, said in found.items() if said["plan"] != self.plan]
        if odd:
            raise ConfigError(f"--node_rank {_list(odd)} was given another recipe or other "
                              "settings; type the same command on every node")

    def launch(self, number: int, port: int, inputs: dict[str, Any]) -> None:
        """Tell the other nodes to start their launcher for a step.

        Args:
            number: of the step, from 1. port: of the launcher.
            inputs: digests of the outputs of the steps that it reads.
        Raises:
            DataError: a node has left meanwhile.
        """
        self.check()
        self._tell(turn=self._told["turn"] + 1, step=number, port=port, inputs=inputs)

    def failed(self) -> tuple[int, int] | None:
        """Return rank and exit code of a node that failed or left; None if there is none."""
        for rank in self._others:
            said = self._member(rank)
            code = said.get("left", said["code"] if said.get("turn") == self._told["turn"] else 0)
            if code:
                return rank, code
        return None

    def check(self) -> None:
        """Raise DataError if a node has failed or left, StopRequested if it was asked to."""
        found = self.failed()
        if found:
            kind = StopRequested if found[1] == StopRequested.exit_code else DataError
            raise kind(f"node {found[0]} has stopped with exit code {found[1]}; see its output, "
                       "and type the command again on every node")

    def wait_for_others(self) -> None:
        """Wait until the launchers of all nodes have ended; see `check`."""
        end = time.monotonic() + LOST_SECONDS
        while time.monotonic() < end and not self.failed():
            if all(self._member(rank).get("turn") == self._told["turn"] for rank in self._others):
                return
            time.sleep(POLL_SECONDS)
        self.check()
        raise DataError("another node has not ended its part of a step that has ended here; see "
                        "its output, and type the command again on every node")


class OtherNode:
    """The side of a node that is not the first; a context manager, which says when it leaves."""

    def __init__(self, root: Path, rank: int, steps: list[Step]) -> None:
        self.folder, self.rank, self.plan = root / "nodes", rank, plan_digest(steps)
        self._said: dict[str, Any] = {"token": secrets.token_hex(8), "plan": self.plan, "turn": 0,
                                      "code": 0}
        self._joined = False

    def __enter__(self) -> OtherNode:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and "answers" in self._said:
            with suppress(OSError):
                self._say(left=getattr(error, "exit_code", 1))

    def _say(self, **news: Any) -> None:
        self._said |= news
        atomic_write_json(self.folder / f"node-{self.rank}.json", self._said)

    def _first(self) -> dict[str, Any]:
        """Return what the first node tells this node; {} until it knows our token."""
        told = _read(self.folder / "first.json")
        return told if told.get("members", {}).get(str(self.rank)) == self._said["token"] else {}

    def next_turn(self) -> dict[str, Any]:
        """Return what the first node tells next: a step to launch, or the end.

        Raises:
            ConfigError: there is no first node. DataError: it has died.
        """
        begin = changed = spoke = time.monotonic()
        heard: dict[str, Any] = {}
        while True:
            now, anybody = time.monotonic(), _read(self.folder / "first.json")
            if anybody.get("token") not in (None, self._said.get("answers")):
                self._say(answers=anybody["token"], turn=0, code=0)  # perhaps of an earlier run
            told = self._first()
            self._joined = self._joined or bool(told)
            if "end" in told or told.get("turn", 0) > self._said["turn"]:
                return told
            if told != heard:
                heard, changed = told, now
            if not self._joined and now - begin > JOIN_SECONDS:
                raise ConfigError(f"--node_rank 0 has not answered in {self.folder} for "
                                  f"{JOIN_SECONDS / 60:.0f} minutes; type the same command on "
                                  "every node, with an --output_dir on a disk that all share")
            if self._joined and now - changed > LOST_SECONDS:
                raise DataError(f"the first node has not written to {self.folder} for "
                                f"{LOST_SECONDS / 60:.0f} minutes; see its output, and type the "
                                "command again on every node")
            if spoke == begin or now - spoke > BEAT_SECONDS:
                print(f"waiting for the first node, {now - begin:.0f} s", flush=True)
                spoke = now
            time.sleep(POLL_SECONDS)

    def wait_for_inputs(self, journal: Any, steps: list[Step], inputs: dict[str, Any]) -> None:
        """Wait until this node sees what the steps before have written; a network disk may lag.

        Raises:
            DataError: it does not see it within the time that NFS may lag.
        """
        end = time.monotonic() + SHARED_DISK_SECONDS
        by_name = {step.name: step for step in steps}
        while unseen := [name for name, known in inputs.items()
                         if journal.digest(by_name[name]) != known]:
            if time.monotonic() > end:
                raise DataError(f"node {self.rank} does not see what step {unseen[0]} has written "
                                "on the first node; give an --output_dir on a disk that all share")
            time.sleep(POLL_SECONDS)

    def is_over(self) -> bool:
        """Return whether the first node has ended while a step runs here: it failed there."""
        return "end" in self._first()

    def ended(self, turn: int, code: int) -> None:
        """Tell the first node that the launcher of a turn has ended here."""
        self._say(turn=turn, code=code)
