"""A real Slurm on the loopback interface: one controller and four nodes, all on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NODES = 4
PACKAGES = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
CONFIG = """
ClusterName=foretell
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=1
SlurmdTimeout=4
MessageTimeout=4
TCPTimeout=1
KillWait=1
MinJobAge=3600
"""
PARTITIONS = """
PartitionName=low Nodes=n[1-{nodes}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=3 \
MaxTime=60 State=UP
PartitionName=high Nodes=n[1-{nodes}] PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


@dataclass
class Cluster:
    """Daemons that this object started, and the environment in which commands reach them."""

    root: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")}

    def do(self, *command: str) -> str:
        """Run a command of Slurm's and return what it says."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self) -> None:
        for folder in ("state", *(f"spool-n{number}" for number in nodes())):
            (self.root / folder).mkdir()
        (self.root / "slurm.conf").write_text(configuration(self.root))
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.root}/munge.sock", f"--pid-file={self.root}/munged.pid",
            f"--log-file={self.root}/munged.log", f"--seed-file={self.root}/munged.seed",
        )  # fmt: skip
        wait_until((self.root / "munge.sock").exists, "munged listens", self.logs)
        self.start_controller()
        for number in nodes():
            self.start_node(number)
        wait_until(lambda: self.states() == ["idle"] * NODES, "all nodes are idle", self.logs)

    def start_controller(self) -> None:
        self._daemon("slurmctld", "slurmctld", "-D")
        wait_until(self._answers, "slurmctld answers", self.logs)

    def _answers(self) -> bool:
        ping = ["scontrol", "ping"]
        done = subprocess.run(ping, env=self.environment, capture_output=True, check=False)
        return b" is UP" in done.stdout

    def start_node(self, number: int) -> None:
        self._daemon(f"slurmd-n{number}", "slurmd", "-D", "-N", f"n{number}")

    def _daemon(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as sink:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(command[0], path=SEARCHED) or command[0], *command[1:]],
                env=self.environment, stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """End a daemon as a crash does."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def cut_off(self, node: str) -> list[int]:
        """End the daemons of a node, as if its network was gone; return the work that goes on."""
        self.kill(f"slurmd-{node}")
        place = f"SLURMD_NODENAME={node}".encode()
        work = [pid for pid in processes() if place in read(pid, "environ").split(b"\0")]
        parents = {
            int(stat.rpartition(b")")[2].split()[1]) for pid in work if (stat := read(pid, "stat"))
        }
        # Those who would tell the controller of the work's end.
        kill([pid for pid in parents if read(pid, "comm") == b"slurmstepd\n"])
        return work

    def lose_node(self, node: str) -> None:
        """End a node as a power cut does: its daemons, and all of the jobs on it."""
        kill(self.cut_off(node))

    def node_of(self, job: str) -> str:
        """Return where a job runs."""
        return self.do("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()

    def resume(self) -> None:
        """Cancel what is left in the queue, and take nodes back that Slurm has shut out."""
        self.do("scancel", "--user=root")
        for number in nodes():
            if f"slurmd-n{number}" not in self.daemons:
                self.start_node(number)
        wait_until(lambda: not self.do("squeue", "--noheader"), "an empty queue", self.logs)
        wait_until(self._resumed, "all nodes are idle", self.logs)

    def _resumed(self) -> bool:
        shut_out = [n for n, state in zip(nodes(), self.states(), strict=True) if state != "idle"]
        for number in shut_out:
            update = ["scontrol", "update", f"NodeName=n{number}", "State=RESUME"]
            subprocess.run(update, env=self.environment, capture_output=True, check=False)
        return not shut_out

    def states(self) -> list[str]:
        return self.do("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t").split()

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.root.glob("*.log"))
        )

    def stop(self) -> None:
        """End all jobs, then the daemons that were started."""
        if "slurmctld" in self.daemons:
            subprocess.run(
                ["scancel", "--user=root"], env=self.environment, capture_output=True, check=False
            )
            with suppress(AssertionError):
                wait_until(lambda: not self.do("squeue", "--noheader"), "no job", self.logs, 15)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def read(pid: int, file: str) -> bytes:
    """Read a file of a process; nothing when it has ended meanwhile."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_bytes()
    return b""


def nodes() -> range:
    return range(1, NODES + 1)


def configuration(root: Path) -> str:
    ports = free_ports(NODES + 1)
    lines = CONFIG.format(host=socket.gethostname().split(".")[0], root=root,
                          controller_port=ports[0])  # fmt: skip
    for number, port in zip(nodes(), ports[1:], strict=True):
        lines += f"NodeName=n{number} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000\n"
    return lines + PARTITIONS.format(nodes=NODES)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_until(
    ready: Callable[[], object], what: str, told: Callable[[], str], seconds: float = 180
) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"it never came to this: {what}\n{told()}"
        time.sleep(0.3)


def require_slurm() -> None:
    """Skip where there is no Slurm to start, with the reason; where CI is set, fail instead."""
    missing = [name for name in PACKAGES if shutil.which(name, path=SEARCHED) is None]
    reason = "Slurm's daemons are started as root, and this is another user" if os.getuid() else ""
    if missing:
        reason = (
            f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client "
            "munge"
        )
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start a cluster that the commands of this process reach, and end it at last."""
    require_slurm()
    with (
        # Of a short path, for a socket lies there.
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        cluster = Cluster(Path(folder))
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
