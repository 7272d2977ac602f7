"""buildah and podman as they are run here: in a storage of their own, below build/.

Nothing is pulled: images are built, or are stand-ins under the names of those that would be pulled.
"""

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

FOLDER = ROOT / "build" / "containers"
PROGRAMS = ("buildah", "podman", "runc", "debootstrap", "iptables", "catatonit")
PYTHON_IMAGE = "docker.io/library/python:3.11-slim-bookworm"
STAND_IN = Path(__file__).parent / "stand_in.sh"

CONFINED = (
    "--read-only",
    "--read-only-tmpfs=false",  # podman would give it a /tmp to write to
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--memory=300m",
    "--health-interval=disable",  # podman has systemd look; `podman healthcheck run` does it once
)

# crun, the default, and limits above our own need a capability that not every root has.
_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_config_dir = "{folder}/networks"
"""
_STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""


def lacking() -> str:
    """Say why containers cannot be run here; empty if they can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        packages = "buildah podman runc netavark aardvark-dns iptables catatonit debootstrap"
        return f"{', '.join(absent)} not installed (Debian's packages {packages})"
    return "" if os.geteuid() == 0 else "containers are run as root here"


def environment() -> dict[str, str]:
    """Write the configuration, and give what points buildah and podman there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = dict(os.environ)
    limits = {
        "files": min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 20_000),
        "processes": min(resource.getrlimit(resource.RLIMIT_NPROC)[1], 10_000),
    }
    for name, text in (("CONTAINERS_CONF", _CONTAINERS_CONF),
                       ("CONTAINERS_STORAGE_CONF", _STORAGE_CONF)):  # fmt: skip
        file = FOLDER / f"{name.lower()}.conf"
        file.write_text(text.format(folder=FOLDER, **limits))
        found[name] = str(file)
    return found


def run(*command: str | Path, code: int = 0, timeout_s: float = 120) -> str:
    """Run a command, which must end with `code`, and give its stdout.

    It runs in the folder of the storage, because a container that is out of memory leaves a file
    in the one where it was started.
    """
    done = subprocess.run(
        list(map(str, command)),
        env=environment(),
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip()


def exists(image: str) -> bool:
    done = subprocess.run(["podman", "image", "exists", image], env=environment(), cwd="/")
    return done.returncode == 0


def stand_in(image: str, *packages: str) -> str:
    """Have an image of that name: a Debian with these packages, if there is none yet."""
    if not exists(image):
        run(STAND_IN, image, *packages, timeout_s=900)
    return image


def build(target: str) -> str:
    """Build a target of the Dockerfile as it is."""
    stand_in(PYTHON_IMAGE)
    image = f"localhost/kanserve:{target}"
    _bud(image, "--target", target, *_pip_of_this_machine(), ROOT)
    return image


def build_text(image: str, dockerfile: str) -> None:
    """Build a Dockerfile that copies nothing."""
    folder = FOLDER / "text"
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile)
    _bud(image, folder)


def _bud(image: str, *arguments: str | Path) -> None:
    options = ("--isolation", "chroot", "--pull-never", "--format", "docker", "--layers")
    run("buildah", "bud", *options, "--tag", image, *arguments, timeout_s=1800)


def _pip_of_this_machine() -> list[str]:
    """Mount pip's configuration into the build, and the certificates and folders that it names."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        settings[key.removeprefix(":env:.").removeprefix("global.")] = value.strip("'")
    file = FOLDER / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {v}\n" for key, v in settings.items()))
    mounts = [f"{file}:/etc/pip.conf:ro"]
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # pip lists a folder of packages under one that holds them.
            whole = path.parent if path.name == "simple" else path
            mounts.append(f"{whole}:{whole}:ro")
    return [part for mount in dict.fromkeys(mounts) for part in ("--volume", mount)]


@dataclass(frozen=True)
class Container:
    """A container that runs, or has run."""

    id: str

    def inspect(self, template: str) -> str:
        return run("podman", "inspect", "--format", template, self.id)

    @property
    def pid(self) -> int:
        """Of its process 1, as this machine counts."""
        return int(self.inspect("{{.State.Pid}}"))

    @property
    def address(self) -> str:
        """Where its port for gRPC is published."""
        return run("podman", "port", self.id, "8001")

    @property
    def ip(self) -> str:
        """Its address in its network; of a pod's container, the pod's."""
        infra = self.inspect("{{.Pod}}") and run(
            "podman",
            "pod",
            "inspect",
            "--format",
            "{{.InfraContainerID}}",
            self.inspect("{{.Pod}}"),
        )
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return Container(infra or self.id).inspect(template)

    def status(self, key: str) -> str:
        """What the kernel says of its process 1."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return value.strip()
        raise AssertionError(f"no {key} in the status of process {self.pid}")

    def execute(self, *command: str, code: int = 0) -> str:
        """Run a command in it, and give what it says."""
        return run("podman", "exec", self.id, *command, code=code)

    def look(self, code: int = 0) -> None:
        """Run the image's health check once; 0 is healthy."""
        run("podman", "healthcheck", "run", self.id, code=code)

    def events(self) -> list[dict[str, Any]]:
        """The log of the server in it."""
        command = ["podman", "logs", self.id]
        done = subprocess.run(command, env=environment(), cwd=FOLDER, capture_output=True)
        return [json.loads(line) for line in done.stderr.splitlines()]

    def stop(self, timeout_s: int = 20) -> float:
        """Send SIGTERM, wait for its end, and tell how many seconds that took."""
        started = time.monotonic()
        run("podman", "stop", "--time", str(timeout_s), self.id)
        return time.monotonic() - started


@contextmanager
def running(
    image: str,
    models: Path,
    *arguments: str,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Container]:
    """A server as it is to be run: confined, its models mounted, its port published here alone."""
    values = [
        part for name, value in (settings or {}).items() for part in ("-e", f"{name}={value}")
    ]
    container = run(
        *("podman", "run", "--detach", "--pull=never", *CONFINED, *values),
        *("--volume", f"{models}:/models:ro", "--publish", "127.0.0.1::8001", image, *arguments),
    )
    try:
        yield Container(container)
    finally:
        run("podman", "rm", "--force", "--time", "0", container)
