"""Connect to Ray or start it, quietly; report a missing cluster immediately."""

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

STORE = 80_000_000  # bytes of Ray's object store if started here: we do not use it
PATIENCE = 5.0  # seconds to wait for an address to respond
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, section 3.4
DATA, HEADERS = 0, 1  # types of frames, section 6
POST, HTTP, OK = 0x83, 0x86, 0x88  # :method, :scheme and :status as one byte each; RFC 7541, appendix A
QUESTION = {":path": "/ray.rpc.NodeInfoGcsService/GetClusterId", ":authority": "ray", "te": "trailers",
            "content-type": "application/grpc"}  # fmt: skip
REMEDY = "start one with `ray start --head`, or leave --address and RAY_ADDRESS out and it is started here"
UNKNOWN = b"grpc-status\x0212"  # a gRPC server's status for an unknown service
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
# Ray replaces 127.0.0.1 by a reachable address, unless told that there are no other machines.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TRIES = {"RAY_NUM_REDIS_GET_RETRIES": "3"}  # seconds after which an address counts as no cluster


def import_ray(joins: bool) -> Any:
    """Import ray.

    Args:
        joins: True to join a cluster, False to start one.
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
    """Start Ray here or join a cluster. ray.init waits long for a missing cluster, so check the address first.

    Args:
        ray: the module.
        address: local, auto, or host:port.
        cores: cores for a Ray started here; 0 for all.
    Raises: UserError if nothing responds, or Ray refuses.
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
            f"the study in a process of its own, or start Ray with `ray start --head` and say --address auto"
        )


def ray_address(address: str | None) -> str:
    """Return the address of Ray: as given, or from RAY_ADDRESS, or `local` to start it here."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


def check_ray_reachable(address: str) -> None:
    """Raise a UserError within `PATIENCE` if nothing that could be Ray responds at the address."""
    if address in ("auto", "local"):
        return  # Ray looks for a local instance, and reports at once if there is none
    host, _, port = address.rpartition(":")
    if not host or not _is_port(port) or "/" in address:
        raise UserError(
            f"--address is host:port of a Ray cluster's head, such as 10.0.0.1:6379, or auto; got {address}"
        )
    why = _why_unreachable(host.strip("[]"), int(port))
    if why:
        raise UserError(f"no Ray cluster answers at {address} ({why}); {REMEDY}")


def _is_port(text: str) -> bool:
    """Return True for a valid port number; isdigit alone also accepts characters such as ²."""
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 2**16


def _why_unreachable(host: str, port: int) -> str:
    """Return why Ray is not reachable; '' if it is. Takes at most `PATIENCE`, even if a name server is slow."""
    said = [f"nothing within {PATIENCE:g} seconds"]

    def ask() -> None:
        try:
            with socket.create_connection((host, port), timeout=2 * PATIENCE) as line:
                line.sendall(PREFACE + _http2_question())
                known = os.environ.get("RAY_USE_TLS") == "1" or _is_ray(line.makefile("rb"))
            said[0] = "" if known else "what answers there is not Ray"
        except OSError as error:
            said[0] = error.strerror or str(error)
        except ValueError:  # a label is empty or too long for a name server
            said[0] = f"{host} is no name of a host"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return said[0]


def _http2_question() -> bytes:
    """Return a request, as two frames, to a service that every cluster's head has and other servers lack."""
    texts = [text.encode() for pair in QUESTION.items() for text in pair]
    spelled = [bytes([len(text)]) + text for text in texts]
    headers = bytes([POST, HTTP]) + b"".join(b"\0" + n + v for n, v in zip(spelled[::2], spelled[1::2], strict=True))
    return _http2_frame(HEADERS, 4, headers) + _http2_frame(
        DATA, 1, bytes(5)
    )  # ends of the headers, and of an empty message


def _http2_frame(kind: int, flags: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags, 0, 0, 0, 1]) + payload


def _is_ray(answer: BinaryIO) -> bool:
    """Return True if the response headers are those of a gRPC server that knows the service; a proxy sends 404."""
    while len(head := answer.read(9)) == 9:
        payload = answer.read(int.from_bytes(head[:3], "big"))
        if head[3] == HEADERS:
            return payload[:1] == bytes([OK]) and UNKNOWN not in payload
    return False


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
