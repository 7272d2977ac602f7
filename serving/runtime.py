"""onnxruntime as it is installed: the right package, alone, with the provider asked for.

`require_onnxruntime` comes before any other import of onnxruntime, because two packages that
overwrote each other may not even import.
"""

import io
import os
from contextlib import redirect_stdout, suppress
from importlib import metadata
from pathlib import Path
from typing import Literal

import structlog

import kan_ops
from serving.errors import StartupError
from serving.memory import memory_limit

MOST_WORKERS = 256
_WORKER_BYTES = 2**28  # with a budget for messages, without models
_MODEL_COPIES = 3  # of a model's bytes: loaded, and while its next version is loaded beside it

Provider = Literal["cpu", "cuda"]
"""Where models run."""

Fused = Literal["auto", "on", "off"]
"""Whether KANLinear layers run by the operator of kan_ops."""

_EXECUTION_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
FATAL_ONLY = 4
"""onnxruntime's log severity that leaves out everything that is also raised."""

_log = structlog.get_logger()


def require_onnxruntime() -> None:
    """Refuse an environment without a working onnxruntime, or with both of its packages.

    Raises:
        StartupError: There is none, there are two, or it cannot be imported.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) > 1:
        raise StartupError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "uninstall both, then "
            "install kanserve's extra cpu or gpu: pip install '.[cpu]' in its checkout"
        )
    try:
        import onnxruntime  # noqa: F401 - whether it can be
    except ImportError as error:
        raise StartupError(
            f"onnxruntime cannot be imported: {error}; "
            "install kanserve's extra cpu or gpu: pip install '.[cpu]' in its checkout"
        ) from error


def prepare(provider: Provider) -> None:
    """Make onnxruntime ready for a provider. Turns off its own log, which is not JSON.

    Raises:
        StartupError: onnxruntime does not have the provider.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(FATAL_ONLY)
    name = _EXECUTION_PROVIDERS[provider]
    available = onnxruntime.get_available_providers()
    if name not in available:
        raise StartupError(
            f"provider {provider} was asked for, but this onnxruntime has only "
            f"{', '.join(available)}; install kanserve's extra gpu, in an environment of its "
            "own, or start with --provider cpu"
        )
    if provider == "cuda":
        with redirect_stdout(io.StringIO()) as printed:  # it prints what it does not find
            # CUDA and cuDNN from their wheels, where installed. Without a folder it would look for
            # them where PyTorch is, if that is there; PyTorch has the same wheels.
            onnxruntime.preload_dlls(directory="")
        if printed.getvalue():
            _log.warning("cuda_libraries", found=printed.getvalue())


def execution_provider(
    provider: Provider, *, tf32: bool, graphs: bool
) -> tuple[str, dict[str, str]]:
    """Name a provider as onnxruntime does, with its options.

    Args:
        provider: Where to run.
        tf32: On CUDA, whether products may keep 10 bits of the mantissa: onnxruntime's default, in
            which no float32 model is as exact as was proven.
        graphs: On CUDA, whether runs are captured as graphs.
    """
    options = {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(graphs))}
    return _EXECUTION_PROVIDERS[provider], options if provider == "cuda" else {}


def choose_fused(wanted: Fused, provider: Provider) -> bool:
    """Find out whether the library of kan_ops, of the installed package, is to be used.

    Raises:
        StartupError: It is wanted and cannot be had.
    """
    import onnxruntime

    if wanted == "off" or (wanted == "auto" and provider != "cpu"):
        return False
    if provider != "cpu":
        raise StartupError(
            f"--fused on: the operator is for CPU, and --provider is {provider}; leave one out"
        )
    try:
        kan_ops.register(onnxruntime.SessionOptions())
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        if wanted == "on":
            raise StartupError(f"--fused on: {error}") from error
        _log.warning("not_fused", reason=str(error))
        return False
    return True


def available_cpus(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the CPUs that this process may use: by its affinity, and by the quota of its cgroup.

    Args:
        cgroups: Where the container's own cgroup is mounted; version 2, or 1.

    Returns:
        At least 1; a part of a CPU beyond a whole one does not count.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # not there, or `max`: no quota
            quota, period = " ".join((cgroups / file).read_text() for file in files).split()
            if int(quota) > 0:
                cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)


def default_workers(provider: Provider, engine_threads: int, model_bytes: int) -> int:
    """Choose how many processes serve: one for every CPU, as far as memory holds their models.

    One process of Python answers no more single rows on two CPUs than on one.

    Args:
        provider: Where models run; on a device one process is enough.
        engine_threads: Threads of one run.
        model_bytes: Of the files of all models.
    """
    if provider != "cpu":
        return 1
    by_memory = memory_limit() // (_WORKER_BYTES + _MODEL_COPIES * model_bytes)
    return max(1, min(available_cpus() // engine_threads, by_memory, MOST_WORKERS))


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
