"""API keys from a YAML or JSON file, sent as `authorization: Bearer KEY`.

keys:
  - key: "the key itself"          # or sha256: its SHA-256 in hex
    tenant: acme
    max_concurrent_requests: 64    # this and what follows may be left out: no limit
    tokens_per_minute: 100000
    models: [tiny]
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from zllm.errors import ConfigError, Unauthenticated
from zllm.service.reloading import Reloading
from zllm.service.tenants import Caller, Grant, Usage

_FIELDS = {"key", "sha256", "tenant", "max_concurrent_requests", "tokens_per_minute", "models"}
# libyaml's, where it was built: thousands of keys are read beside what runs.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST = 2**53
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ApiKeys:
    """Raises ConfigError where the file is not as it should be. Of `parts` that do not know of each
    other, each lets in its part of what the file allows."""

    def __init__(self, file: str, *, parts: int = 1) -> None:
        self._usage: dict[bytes, Usage] = {}
        self._grants = Reloading(
            lambda: {key: grant.divided(parts) for key, grant in load_keys(file).items()}, [file]
        )

    def caller(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """Who sends this call. Raises Unauthenticated, which does not say how near a key was."""
        value = metadata.get("authorization", "")
        scheme, _, key = (value if isinstance(value, str) else "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("send an API key as metadata `authorization: Bearer KEY`")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found: bytes | None = None
        grants = self._grants.get()
        # Every key is compared, in constant time: how long it takes says nothing of any.
        for known in grants:
            if hmac.compare_digest(known, digest):
                found = known
        if found is None:
            raise Unauthenticated("this API key is not known here")
        return Caller(grants[found], self._usage.setdefault(found, Usage()))


def load_keys(file: str) -> dict[bytes, Grant]:
    """Grants by the SHA-256 of their keys. No message holds a key."""
    where = f"--api-keys {file}"
    try:
        content = _parse(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; name a YAML or JSON file") from None
    except Exception:  # a month 13, a tag's reader, no UTF-8 ... whose own words quote the file
        raise ConfigError(f"{where}: it is neither YAML nor JSON") from None
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: it must hold a list `keys` of at least one key")
    grants: dict[bytes, Grant] = {}
    for index, entry in enumerate(entries):
        at = f"{where}: keys[{index}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{at}: it must be a mapping with `key` and `tenant`")
        unknown = sorted(str(name) for name in set(entry) - _FIELDS)
        if unknown:
            raise ConfigError(f"{at}: {unknown[0]!r} is none of {', '.join(sorted(_FIELDS))}")
        digest = _digest(entry, at)
        if digest in grants:
            raise ConfigError(f"{at}: it repeats an earlier key; give each its own")
        grants[digest] = _grant(entry, at)
    return grants


def _parse(text: str) -> Any:
    """What yaml.safe_load gives, by the faster loader."""
    loader = _LOADER(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _digest(entry: Mapping[str, Any], at: str) -> bytes:
    key, digest = entry.get("key"), entry.get("sha256")
    if (key is None) == (digest is None):
        raise ConfigError(f"{at}: give either `key` or `sha256`")
    if digest is not None:
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise ConfigError(f"{at}.sha256: it must be 64 hexadecimal digits, in quotes")
        return bytes.fromhex(digest)
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]{16,}", key):
        raise ConfigError(
            f"{at}.key: it must be a string of at least 16 printable ASCII characters, no spaces"
        )
    return hashlib.sha256(key.encode()).digest()


def _grant(entry: Mapping[str, Any], at: str) -> Grant:
    tenant = entry.get("tenant")
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ConfigError(f"{at}.tenant: it must be 1 to 64 letters, digits, '.', '_' or '-'")
    models = entry.get("models")
    if models is not None and not (
        isinstance(models, list) and models and all(isinstance(name, str) for name in models)
    ):
        raise ConfigError(f"{at}.models: it must be a list of names; leave it out to allow all")
    return Grant(
        tenant=tenant,
        max_concurrent_requests=_limit(entry, "max_concurrent_requests", at),
        tokens_per_minute=_limit(entry, "tokens_per_minute", at),
        models=None if models is None else frozenset(models),
    )


def _limit(entry: Mapping[str, Any], name: str, at: str) -> int | None:
    value = entry.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
        raise ConfigError(f"{at}.{name}: {value!r} is no whole number in [1, 2^53]")
    return value
