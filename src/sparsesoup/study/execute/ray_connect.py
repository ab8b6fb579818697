"""Connect to Ray or start it, quietly; report a missing cluster within seconds."""

import contextlib
import importlib
import importlib.util
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from sparsesoup.core.errors import UserError

STORE = 80_000_000  # bytes of Ray's object store if started here: we do not use it
PATIENCE = 5.0  # seconds to wait for an address to respond
REMEDY = "start one with `ray start --head`, or leave --address and RAY_ADDRESS out and it is started here"
CARRIED = (  # names of variables sent to nodes: they are stored in the job data, which others can read
    "SPARSESOUP_DATA", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "TORCH_HOME",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
)  # fmt: skip
RAY = {  # read by Ray on import
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # hides GPUs from trials that requested none
}
# Ray replaces 127.0.0.1 by a reachable address, unless it knows that there are no other machines.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# By default Ray tries to join for more than a minute, also where another server answers; so it takes 20 seconds.
QUICK = {"RAY_py_gcs_connect_timeout_s": "10", "RAY_NUM_REDIS_GET_RETRIES": "1"}


def import_ray(joins: bool) -> Any:
    """Import ray, to join a cluster or to start one."""
    for name, value in (RAY | (QUICK if joins else {})).items():
        os.environ.setdefault(name, value)
    if not joins:
        os.environ.update(ALONE)
    if importlib.util.find_spec("ray") is None:
        raise UserError("--executor ray needs Ray; run pip install 'sparsesoup[ray]'")
    return importlib.import_module("ray")


def connect_ray(ray: Any, address: str, cores: int) -> None:
    """Start Ray here with so many cores (0 for all), or join a cluster; the address is local, auto, or host:port."""
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        settings |= {"num_cpus": cores or None, "include_dashboard": False, "object_store_memory": STORE}
    else:
        check_ray_reachable(address)
        settings |= {"runtime_env": {"env_vars": portable_environment(os.environ)}}
    try:
        with _silence_stderr():
            ray.init(**settings)
    except Exception as error:
        what = "Ray does not start here" if address == "local" else f"cannot join the Ray cluster at {address}"
        remedy = "" if address == "local" else f"; {REMEDY}"
        raise UserError(f"{what}: {last_error_line(error).rstrip('.')}{remedy}") from error
    if address == "local":
        _need_loopback(ray)


def portable_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to send to the nodes of a cluster: none with a token, or a URL with a password.

    >>> portable_environment({"HF_HOME": "/models", "HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://me:secret@mirror"})
    {'HF_HOME': '/models'}
    """
    found = {name: environment[name] for name in CARRIED if name in environment}
    return {name: value for name, value in found.items() if not re.search(r"://[^/]*@", value)}


def _need_loopback(ray: Any) -> None:
    """Stop Ray and raise a UserError if other machines can reach the instance started here."""
    reached = [node["NodeManagerAddress"] for node in ray.nodes()]
    if others := [address for address in reached if not ipaddress.ip_address(address).is_loopback]:
        ray.shutdown()
        raise UserError(
            f"Ray would listen at {others[0]}, where other machines reach it: its module was imported before; begin "
            f"the study in a separate process, or start Ray with `ray start --head` and say --address auto"
        )


def ray_address(address: str | None) -> str:
    """Return the address of Ray: as given, or from RAY_ADDRESS, or `local` to start it here."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


def check_ray_reachable(address: str) -> None:
    """Raise a UserError if nothing listens at the address. Whether it is Ray turns out when it is joined."""
    if address in ("auto", "local"):
        return  # Ray looks for a local instance, and reports at once if there is none
    host, _, port = address.rpartition(":")
    valid = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 2**16  # isdigit accepts ² too
    if not host or not valid or "/" in address:
        raise UserError(
            f"--address is host:port of a Ray cluster's head, such as 10.0.0.1:6379, or auto; got {address}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        why = error.strerror or f"nothing within {PATIENCE:g} seconds"
        raise UserError(f"no Ray cluster answers at {address} ({why}); {REMEDY}") from error
    except ValueError as error:  # a label is empty or too long for a name server
        raise UserError(f"no Ray cluster answers at {address} ({host} is no name of a host); {REMEDY}") from error


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discard stderr in this block, including that of C++ code: errors are raised as well."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def last_error_line(error: BaseException) -> str:
    """Return the last line of an error: for a worker's traceback forwarded by Ray, the cause."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
