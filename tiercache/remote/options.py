"""What `target_options` mean: options in the style of s3fs, gcsfs, adlfs and fsspec's http, as settings of obstore.

Options that obstore has no equal for raise Unsupported: the caller then uses the fsspec filesystem itself, which is
slower and right. Where s3fs would ask the environment, profiles or the instance for credentials, botocore is asked.
"""

from __future__ import annotations

import http.client
import os
import shlex
from dataclasses import dataclass, field
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tiercache.errors import ConfigError, OriginError
from tiercache.remote.places import contents, meaning, owned
from tiercache.remote.rights import ITS_OWN, digest, surroundings
from tiercache.settings import read_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REGION = "us-east-1"
REGION_TIMEOUT_S = 5.0
S3_IGNORED = ITS_OWN | frozenset(
    {
        "default_block_size",
        "default_fill_cache",
        "default_cache_type",
        "version_aware",
        "cache_regions",
        "max_concurrency",
        "fixed_upload_size",
    }
)
"""Options that only say how s3fs itself works."""


CONFIG_SEMANTIC = frozenset({"signature_version", "proxies", "proxies_config", "client_cert", "inject_host_prefix"})


class Unsupported(Exception):
    """An option that obstore has no equal for."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Settings for obstore: `config` for a store, `client` for its HTTP client, and who reads."""

    scheme: str
    reader: str
    """Endpoint and rights, without secrets: what Origin.identity is made of."""
    config: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)
    credentials: Callable[[], dict[str, Any]] | None = None
    needs_region: bool = False


def s3_options(options: Mapping[str, Any]) -> StoreOptions:
    """StoreOptions of s3fs-style options. Raises Unsupported, or ConfigError for contradictions."""
    rest = {k: v for k, v in options.items() if k not in S3_IGNORED and v is not None}
    kwargs = dict(rest.pop("client_kwargs", None) or {})
    config: dict[str, Any] = {}
    client: dict[str, Any] = {}
    session = _Session(rest.pop("profile", None))
    endpoint = rest.pop("endpoint_url", None) or kwargs.pop("endpoint_url", None) or session.endpoint()
    kwargs.pop("endpoint_url", None)
    if endpoint:
        config["endpoint"] = str(endpoint).rstrip("/")
        client["allow_http"] = urlsplit(str(endpoint)).scheme == "http"
    elif rest.pop("use_ssl", True) is False or kwargs.pop("use_ssl", True) is False:
        raise Unsupported("use_ssl=False without endpoint_url")
    rest.pop("use_ssl", None)
    kwargs.pop("use_ssl", None)
    region = kwargs.pop("region_name", None) or session.region()
    verify = kwargs.pop("verify", None)
    if verify is False:
        client["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        with open(verify, "rb") as stream:
            client["root_certificate"] = stream.read()
    if rest.pop("requester_pays", False):
        config["request_payer"] = True
    _config_kwargs(rest.pop("config_kwargs", None) or {}, config)
    anonymous = bool(rest.pop("anon", False))
    reader, credentials = _s3_credentials(rest, kwargs, session, config, anonymous=anonymous)
    unknown = sorted({k for k, v in rest.items() if v} | {f"client_kwargs.{k}" for k in kwargs})
    if unknown:
        raise Unsupported(", ".join(unknown))
    config["region"] = region or REGION
    place = config.get("endpoint", "amazonaws.com")
    needs_region = not region and not endpoint
    return StoreOptions("s3", f"s3+{place}+{reader}", config, client, credentials, needs_region)


def _config_kwargs(given: Mapping[str, Any], config: dict[str, Any]) -> None:
    """The part of botocore's Config that says what is sent; the rest is pools and timeouts, which we have our own."""
    for name, value in given.items():
        if name == "s3":
            styles = {k: v for k, v in dict(value).items() if k != "addressing_style"}
            if any(styles.values()):
                raise Unsupported(f"config_kwargs.s3: {', '.join(styles)}")
            config["virtual_hosted_style_request"] = value.get("addressing_style") == "virtual"
        elif name in CONFIG_SEMANTIC and value not in ("s3v4", None):
            raise Unsupported(f"config_kwargs.{name}")


def _s3_credentials(
    rest: dict[str, Any], kwargs: dict[str, Any], session: _Session, config: dict[str, Any], *, anonymous: bool
) -> tuple[str, Callable[[], dict[str, Any]] | None]:
    """(who reads, a source of credentials that expire) with what does not expire put into `config`."""
    names = {"key": ("username", "aws_access_key_id"), "secret": ("password", "aws_secret_access_key")}
    names["token"] = ("", "aws_session_token")
    given = {k: rest.pop(k, None) or rest.pop(a, None) or kwargs.get(b) for k, (a, b) in names.items()}
    for alias, name in names.values():
        rest.pop(alias, None)
        kwargs.pop(name, None)
    if anonymous:
        config["skip_signature"] = True
        return "anonymous", None
    if bool(given["key"]) != bool(given["secret"]):
        raise ConfigError("key and secret belong together: give both, a profile, or anon=True")
    if given["key"]:
        config["access_key_id"], config["secret_access_key"] = given["key"], given["secret"]
        if given["token"]:
            config["session_token"] = given["token"]
        return digest(given["key"], given["secret"], given["token"]), None
    return session.credentials(config)


class _Session:
    """What botocore finds where s3fs would look; finds nothing when botocore is not installed."""

    def __init__(self, profile: str | None) -> None:
        self._profile = profile
        try:
            import botocore.session
        except ImportError:
            if profile:
                raise Unsupported("profile (botocore is not installed)") from None
            self._session = None
        else:
            self._session = botocore.session.Session(profile=profile)

    def region(self) -> str | None:
        return self._variable("region")

    def endpoint(self) -> str | None:
        if self._session is None:
            return None
        from botocore.configprovider import ConfiguredEndpointProvider

        scoped = self._session.get_scoped_config()
        found = ConfiguredEndpointProvider(self._session.full_config, scoped, "s3").provide()
        return str(found) if found else None

    def credentials(self, config: dict[str, Any]) -> tuple[str, Callable[[], dict[str, Any]] | None]:
        """Static credentials go into `config`; the second value gives those that expire."""
        if self._session is None:
            return surroundings(), None
        from botocore.credentials import RefreshableCredentials

        found = self._session.get_credentials()
        if found is None:
            raise OriginError("no credentials found: give key and secret, a profile, or anon=True")
        if isinstance(found, RefreshableCredentials):
            # Not looked at here: roles may have no keys before the first request, and others by the hour after it.
            return digest(found.method, self._configured(self._session), surroundings()), partial(_current, found)
        frozen = found.get_frozen_credentials()
        config["access_key_id"], config["secret_access_key"] = frozen.access_key, frozen.secret_key
        if frozen.token:
            config["session_token"] = frozen.token
        return digest(frozen.access_key, frozen.secret_key, frozen.token), None

    def _configured(self, session: Any) -> list[object]:
        """What files of configuration say of who gets a role: the profile and those it builds on, with their own keys,
        the single sign-on, and where tokens come from, which change by the hour."""
        config = session.full_config
        profiles, sessions = config.get("profiles", {}), config.get("sso_sessions", {})
        name, told, met = self._profile or self._variable("profile") or "default", list[object](), set[str]()
        while name in profiles and name not in met:
            met.add(name)
            found = profiles[name]
            token = found.get("web_identity_token_file")
            command = shlex.split(found.get("credential_process", ""))
            token_of = owned(token) if token else None
            # The words of a command may be options as well as files: only files that are there count.
            there = [word for word in command if os.path.exists(word)]
            told.append([name, found, sessions.get(found.get("sso_session")), token_of, meaning("", there, {})])
            name = found.get("source_profile", "")
        token = read_machine().environ.get("AWS_WEB_IDENTITY_TOKEN_FILE")
        return [*told, owned(token) if token else None]

    def _variable(self, name: str) -> str | None:
        value = self._session.get_config_variable(name) if self._session is not None else None
        return str(value) if value else None


def _current(found: Any) -> dict[str, Any]:
    """Credentials that expire, as obstore asks for them soon before: botocore refreshes earlier by itself."""
    found.get_frozen_credentials()
    with found._refresh_lock:  # or these could be old keys with the time that new ones last
        frozen, expires_at = found._frozen_credentials, found._expiry_time
    return {
        "access_key_id": frozen.access_key,
        "secret_access_key": frozen.secret_key,
        "token": frozen.token,
        "expires_at": expires_at.astimezone(UTC) if expires_at is not None else None,  # obstore takes no other zone
    }


def bucket_region(bucket: str, host: str = "", *, secure: bool = True) -> str:
    """Region of a bucket as S3 tells anyone who asks (also with a refusal); the default region when it does not."""
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    place, path = (host, f"/{bucket}") if host else (f"{bucket}.s3.amazonaws.com", "/")
    connection = kind(place, timeout=REGION_TIMEOUT_S)
    try:
        connection.request("HEAD", path)
        return connection.getresponse().getheader("x-amz-bucket-region") or REGION
    except (OSError, http.client.HTTPException):
        return REGION
    finally:
        connection.close()


def gs_options(options: Mapping[str, Any]) -> StoreOptions:
    """StoreOptions of gcsfs-style options: token ("anon", "google_default" or a key file) and endpoint_url."""
    rest = {k: v for k, v in options.items() if v is not None and k not in S3_IGNORED | {"project", "access"}}
    config: dict[str, Any] = {}
    client: dict[str, Any] = {}
    token, endpoint = rest.pop("token", "google_default"), rest.pop("endpoint_url", None)
    if endpoint:
        config["base_url"] = endpoint
        client["allow_http"] = urlsplit(endpoint).scheme == "http"
    if token == "anon":
        config["skip_signature"] = True
        reader = "anonymous"
    elif isinstance(token, str) and os.path.exists(token):
        config["application_credentials"] = os.path.abspath(token)
        reader = digest(contents(token))
    elif token == "google_default":
        reader = digest("google_default", surroundings(), [contents(path) for path in google_files()])
    else:
        raise Unsupported("token")
    if rest:
        raise Unsupported(", ".join(sorted(rest)))
    return StoreOptions("gs", f"gs+{endpoint or 'googleapis.com'}+{reader}", config, client)


def google_files() -> list[str]:
    """Where Google's default credentials may lie, as far as these files are there."""
    machine = read_machine()
    given = machine.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or machine.environ.get("GOOGLE_SERVICE_ACCOUNT")
    folder = machine.environ.get("CLOUDSDK_CONFIG") or str(machine.home / ".config" / "gcloud")
    places = (given, os.path.join(folder, "application_default_credentials.json"))
    return [place for place in places if place and os.path.exists(place)]


AZURE_NAMES = {
    "account_name": "account_name",
    "account_key": "account_key",
    "sas_token": "sas_key",
    "tenant_id": "tenant_id",
    "client_id": "client_id",
    "client_secret": "client_secret",
}


def az_options(options: Mapping[str, Any]) -> StoreOptions:
    """StoreOptions of adlfs-style options: account_name with a key, a SAS token, a service principal, or anon=True."""
    rest = {k: v for k, v in options.items() if v is not None and k not in S3_IGNORED}
    config = {ours: rest.pop(name) for name, ours in AZURE_NAMES.items() if name in rest}
    if "account_name" not in config:
        raise Unsupported("no account_name")
    proven = any(config.get(name) for name in ("account_key", "sas_key", "client_secret"))
    reader = digest(config, "" if proven else surroundings())
    if rest.pop("anon", False):
        config["skip_signature"] = True
        reader = "anonymous"
    if rest:
        raise Unsupported(", ".join(sorted(rest)))
    return StoreOptions("az", f"az+{config['account_name']}+{reader}", config)


def http_options(options: Mapping[str, Any]) -> StoreOptions:
    """StoreOptions of fsspec's http options: only headers and an aiohttp-style basic login are understood."""
    rest = {k: v for k, v in options.items() if v is not None and k not in S3_IGNORED | {"block_size", "same_scheme"}}
    kwargs = dict(rest.pop("client_kwargs", None) or {})
    headers = dict(rest.pop("headers", None) or {}) | dict(kwargs.pop("headers", None) or {})
    if rest or kwargs:
        raise Unsupported(", ".join(sorted(rest | kwargs)))
    client: dict[str, Any] = {"allow_http": True}
    if headers:
        client["default_headers"] = {str(k): str(v) for k, v in headers.items()}
    reader = digest(headers) if headers else "anonymous"
    return StoreOptions("http", f"http+{reader}", {}, client)


UNDERSTOOD: dict[str, Callable[[Mapping[str, Any]], StoreOptions]] = {
    "s3": s3_options,
    "gs": gs_options,
    "az": az_options,
    "http": http_options,
}
"""By scheme: what makes StoreOptions of a filesystem's options."""
