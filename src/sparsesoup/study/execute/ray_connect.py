"""Ray found or started, quietly, and what is not there told at once."""

import contextlib
import importlib
import importlib.util
import ipaddress
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from sparsesoup.core.errors import UserError

STORE = 80_000_000  # bytes of Ray's object store where we start it: nothing of ours goes through it
PATIENCE = 5.0  # seconds in which an address must answer
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, section 3.4
DATA, HEADERS = 0, 1  # types of frames, section 6
POST, HTTP, OK = 0x83, 0x86, 0x88  # :method, :scheme and :status as one byte each; RFC 7541, appendix A
QUESTION = {":path": "/ray.rpc.NodeInfoGcsService/GetClusterId", ":authority": "ray", "te": "trailers",
            "content-type": "application/grpc"}  # fmt: skip
REMEDY = "start one with `ray start --head`, or leave --address and RAY_ADDRESS out and it is started here"
UNKNOWN = b"grpc-status\x0212"  # what a gRPC server says of a service that it does not have
CARRIED = (  # variables that nodes get, by name: what a cluster is given stands in its job data, which has readers
    "SPARSESOUP_DATA", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "TORCH_HOME",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
)  # fmt: skip
RAY = {  # what Ray reads when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a cell without a GPU sees none
}
# Ray replaces 127.0.0.1 by an address that others reach, unless it is told that there are no others.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TRIES = {"RAY_NUM_REDIS_GET_RETRIES": "3"}  # seconds that an address may take to turn out to be no cluster


def import_ray(joins: bool) -> Any:
    """The module ray.

    Args:
        joins: a cluster, rather than start one.
    Raises: UserError if it is not installed.
    """
    for name, value in (RAY | (TRIES if joins else {})).items():
        os.environ.setdefault(name, value)
    if not joins:
        os.environ.update(ALONE)
    if importlib.util.find_spec("ray") is None:
        raise UserError("--executor ray needs Ray; say pip install 'sparsesoup[ray]'")
    return importlib.import_module("ray")


def connect_ray(ray: Any, address: str, cores: int) -> None:
    """Start Ray here or join a cluster. ray.init waits long for what is not there, so that is asked first.

    Args:
        ray: the module.
        address: local, auto, or host:port.
        cores: of a Ray that is started here; 0 for all there are.
    Raises: UserError if nothing answers, or Ray refuses.
    """
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
    """The variables that go along to the nodes of a cluster: none that holds a token, nor an address with a password.

    >>> portable_environment({"HF_HOME": "/models", "HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://me:secret@mirror"})
    {'HF_HOME': '/models'}
    """
    found = {name: environment[name] for name in CARRIED if name in environment}
    return {name: value for name, value in found.items() if not re.search(r"://[^/]*@", value)}


def _need_loopback(ray: Any) -> None:
    """Raise a UserError, and end Ray, if other machines reach what was started here."""
    reached = [node["NodeManagerAddress"] for node in ray.nodes()]
    if others := [address for address in reached if not ipaddress.ip_address(address).is_loopback]:
        ray.shutdown()
        raise UserError(
            f"Ray would listen at {others[0]}, where other machines reach it: its module was imported before; begin "
            f"the study in a process of its own, or start Ray with `ray start --head` and say --address auto"
        )


def ray_address(address: str | None) -> str:
    """Where Ray is: as said, or as RAY_ADDRESS says, or `local`: started here."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


def check_ray_reachable(address: str) -> None:
    """Raise a UserError within `PATIENCE` if nothing answers there that could be Ray."""
    if address in ("auto", "local"):
        return  # Ray looks at what runs on this machine, and says at once that there is none
    host, _, port = address.rpartition(":")
    if not host or not _is_port(port) or "/" in address:
        raise UserError(
            f"--address is host:port of a Ray cluster's head, such as 10.0.0.1:6379, or auto; got {address}"
        )
    why = _why_unreachable(host.strip("[]"), int(port))
    if why:
        raise UserError(f"no Ray cluster answers at {address} ({why}); {REMEDY}")


def _is_port(text: str) -> bool:
    """Whether it is a number that a port can have; isdigit alone also takes signs such as ²."""
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 2**16


def _why_unreachable(host: str, port: int) -> str:
    """Why Ray is not there; empty if it is. Within `PATIENCE`, however long a name server takes."""
    said = [f"nothing within {PATIENCE:g} seconds"]

    def ask() -> None:
        try:
            with socket.create_connection((host, port), timeout=2 * PATIENCE) as line:
                line.sendall(PREFACE + _http2_question())
                known = os.environ.get("RAY_USE_TLS") == "1" or _is_ray(line.makefile("rb"))
            said[0] = "" if known else "what answers there is not Ray"
        except OSError as error:
            said[0] = error.strerror or str(error)
        except ValueError:  # a part of it is empty or longer than a name server takes
            said[0] = f"{host} is no name of a host"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return said[0]


def _http2_question() -> bytes:
    """A call of a service that every cluster's head has, as two frames; whoever is none answers otherwise."""
    texts = [text.encode() for pair in QUESTION.items() for text in pair]
    spelled = [bytes([len(text)]) + text for text in texts]
    headers = bytes([POST, HTTP]) + b"".join(b"\0" + n + v for n, v in zip(spelled[::2], spelled[1::2], strict=True))
    return _http2_frame(HEADERS, 4, headers) + _http2_frame(
        DATA, 1, bytes(5)
    )  # ends of the headers, and of an empty message


def _http2_frame(kind: int, flags: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags, 0, 0, 0, 1]) + payload


def _is_ray(answer: BinaryIO) -> bool:
    """Whether the headers that come back are a gRPC server's that knows the service: a proxy says 404 or the like."""
    while len(head := answer.read(9)) == 9:
        payload = answer.read(int.from_bytes(head[:3], "big"))
        if head[3] == HEADERS:
            return payload[:1] == bytes([OK]) and UNKNOWN not in payload
    return False


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Nothing is written to stderr in this block, not by C++ either: what goes wrong is raised as well."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def last_error_line(error: BaseException) -> str:
    """The last line of an error: where Ray passes a worker's traceback on, its cause."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
