"""What a namespace needs once before it works: `python -m cluster.bootstrap secrets`, then `... mlflow-users`.

Both may be run again at any time. A Secret that is there is never changed; MLflow's users get the passwords that their
Secret holds, so that a password that was changed there is taken up.
"""

import base64
import hashlib
import json
import os
import secrets
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds the token of its service account."""
API_SERVER = "https://kubernetes.default.svc"
CLIENT = "team"
"""Name of the first API key."""
USERS = {"trainer": "ONETHRESHOLD_TRAINER_PASSWORD", "reader": "ONETHRESHOLD_READER_PASSWORD"}
"""Users of MLflow, and the environment variables of their passwords: one logs runs, one fetches models."""


SECRETS: Mapping[str, tuple[str, ...]] = {
    "postgres": ("postgres-password", "mlflow-password", "optuna-password"),
    "redis": ("password",),
    "mlflow": ("admin-password", "trainer-password", "reader-password", "session-key"),
    "ray": ("auth_token",),
    "api-key": ("key", "hashes"),
}
"""The Secrets by name, and their keys."""


def make_secrets(api_server: str = API_SERVER, account: Path = ACCOUNT) -> list[str]:
    """Creates the Secrets that the namespace has not got, with random values; returns their names.

    Args:
        api_server: address of the API server.
        account: folder of the service account's token, namespace and the API server's certificate.

    Raises:
        ValueError: the API server refuses, or a Secret that is there lacks a key.
    """
    namespace = (account / "namespace").read_text().strip()
    token = (account / "token").read_text().strip()
    address = f"{api_server}/api/v1/namespaces/{namespace}/secrets"
    certificate = account / "ca.crt"
    trust = ssl.create_default_context(cafile=certificate) if api_server.startswith("https:") else None
    made = []
    for name, keys in SECRETS.items():
        status, found = _ask("GET", f"{address}/{name}", f"Bearer {token}", trust=trust)
        if status == 404:
            body = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "onethreshold"}},
                "stringData": values(name),
            }
            status, found = _ask("POST", address, f"Bearer {token}", body, trust=trust)
            if status == 201:
                made.append(name)
                continue
        if status == 409:  # somebody was faster
            continue
        if status != 200:
            raise ValueError(f"Secret {name} in namespace {namespace}: {status} {_message(found)}")
        missing = sorted(set(keys) - set(found.get("data") or {}))
        if missing:
            raise ValueError(
                f"Secret {name} in namespace {namespace} has no {', '.join(missing)}; add what is missing, or delete "
                "the Secret to have a new one made"
            )
    return made


def values(name: str) -> dict[str, str]:
    """Random values for a Secret of `SECRETS`."""
    if name == "api-key":
        key = f"ot-{secrets.token_urlsafe(32)}"
        # The line NAME SHA256 by which serve.keys knows it: the endpoint is given nothing else.
        return {"key": key, "hashes": f"{CLIENT} {hashlib.sha256(key.encode()).hexdigest()}"}
    return {key: secrets.token_urlsafe(32) for key in SECRETS[name]}


def make_users(mlflow: str, admin: tuple[str, str], passwords: Mapping[str, str], *, wait: float = 1800.0) -> list[str]:
    """Creates MLflow's users where they are missing, and sets the passwords of the others; returns the new ones.

    Args:
        mlflow: address of the server.
        admin: name and password of its administrator.
        passwords: by user.
        wait: seconds to wait for a server that does not answer yet.

    Raises:
        ValueError: it does not answer in time, or refuses.
    """
    _wait_for(mlflow, wait)
    credentials = base64.b64encode(":".join(admin).encode()).decode()
    made = []
    for user, password in passwords.items():
        body = {"username": user, "password": password}
        call = f"{mlflow}/api/2.0/mlflow/users"
        status, said = _ask("POST", f"{call}/create", f"Basic {credentials}", body)
        if status == 200:
            made.append(user)
            continue
        if said.get("error_code") == "RESOURCE_ALREADY_EXISTS":
            status, said = _ask("PATCH", f"{call}/update-password", f"Basic {credentials}", body)
        if status != 200:
            raise ValueError(f"MLflow at {mlflow}, user {user}: {status} {_message(said)}")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words == ["secrets"]:
            made = make_secrets()
            print(f"Secrets made: {', '.join(made) or 'none, all were there'}")
        elif words == ["mlflow-users"]:
            admin = (_variable("MLFLOW_TRACKING_USERNAME"), _variable("MLFLOW_TRACKING_PASSWORD"))
            passwords = {user: _variable(name) for user, name in USERS.items()}
            made = make_users(_variable("MLFLOW_TRACKING_URI"), admin, passwords)
            print(f"MLflow's users made: {', '.join(made) or 'none, all were there'}")
        else:
            raise ValueError("usage: python -m cluster.bootstrap secrets | mlflow-users")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _variable(name: str) -> str:
    if not os.environ.get(name):
        raise ValueError(f"{name} is not set in the environment")
    return os.environ[name]


def _wait_for(mlflow: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if _ask("GET", f"{mlflow}/health", "")[0] == 200:
                return
        except OSError:
            pass
        if time.monotonic() >= deadline:
            raise ValueError(f"MLflow at {mlflow} has not answered for {seconds:g} s")
        time.sleep(2.0)


def _ask(
    method: str, url: str, authorization: str, body: object = None, *, trust: ssl.SSLContext | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and JSON answer; what is no JSON object is {}."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": authorization}
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310  # the person's own address
    try:
        with urllib.request.urlopen(request, timeout=30, context=trust) as answer:  # noqa: S310
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        status, text = refused.code, refused.read()
    try:
        read = json.loads(text)
    except ValueError:
        read = {}
    return status, read if isinstance(read, dict) else {}


def _message(answer: Mapping[str, Any]) -> str:
    return str(answer.get("message") or "refused")


if __name__ == "__main__":
    raise SystemExit(main())
