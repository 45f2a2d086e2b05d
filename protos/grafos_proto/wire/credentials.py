"""A key with its certificate: in memory, on disk, and on the channels of gRPC.

Rules. A private key is never printed: it is left out of every `repr`, and no failure quotes what a
file holds. On disk it lies in a file of its own with mode 0600; a key that others may read is
refused, since it must be taken for stolen. Files are replaced as wholes, synced before and after
the rename, so that a crash leaves the old one or the new one. The certificate is written last:
whoever finds it finds the key that it is for.

    tls.key   the private key, 0600          tls.crt   leaf, then intermediate
    ca.crt    the roots that peers must lead to
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from grafos_core import failure, spiffe
from grafos_core.spiffe import Identity
from grafos_proto.wire import certificates, ttrpc
from grafos_proto.wire.certificates import Certificate, TlsKey

KEY_FILE, CHAIN_FILE, BUNDLE_FILE = "tls.key", "tls.crt", "ca.crt"
FILE_BYTES_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a process shows to others, what it proves it with, and whom it believes."""

    key_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    bundle_pem: bytes = field(repr=False)

    @property
    def certificate(self) -> Certificate:
        return certificates.parse(self.chain_pem)

    @property
    def identity(self) -> Identity:
        return self.certificate.identity

    @property
    def thumbprint(self) -> str:
        return self.certificate.thumbprint

    @property
    def key(self) -> TlsKey:
        return certificates.load_key(self.key_pem)

    def check(self, now_ms: int) -> Credentials:
        """Give them back if key, chain and roots belong together and the chain is in force."""
        leaf = certificates.verify_chain(self.chain_pem, self.bundle_pem, now_ms)
        if certificates.thumbprint(self.key.public_key()) != leaf.thumbprint:
            raise failure.of("IDENTITY", "the certificate is for another key")
        return self


Provider = Callable[[], Credentials]
"""Gives the credentials in force now. Cheap: it is asked at every handshake."""


class IdentityFiles:
    """The credentials of one process in its own folder, and their latest copy in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.key_path = directory / KEY_FILE
        self.chain_path = directory / CHAIN_FILE
        self.bundle_path = directory / BUNDLE_FILE
        self._current: Credentials | None = None

    def __call__(self) -> Credentials:
        """The credentials in force: what was saved or loaded last. This makes it a `Provider`."""
        return self._current or self.load()

    def load(self) -> Credentials:
        """Read all three files again."""
        self._current = Credentials(
            read_private(self.key_path), _read(self.chain_path), _read(self.bundle_path)
        )
        return self._current

    def save(self, credentials: Credentials) -> None:
        """Make `credentials` the ones in force, on disk first."""
        make_private_directory(self._directory)
        write_file(self.key_path, credentials.key_pem, mode=0o600)
        write_file(self.bundle_path, credentials.bundle_pem, mode=0o644)
        write_file(self.chain_path, credentials.chain_pem, mode=0o644)
        self._current = credentials

    def key(self) -> TlsKey:
        """The key in the folder; made now if there is none, so that it outlives restarts."""
        if self.key_path.exists():
            return certificates.load_key(read_private(self.key_path))
        key = certificates.new_tls_key()
        make_private_directory(self._directory)
        write_file(self.key_path, certificates.key_pem(key), mode=0o600)
        return key


class PeerChannel:
    """A channel to one known peer that follows the renewals of our own certificate.

    A channel keeps the certificate with which it was made. So `get` makes another one when the
    provider gives another chain, and leaves the one before open for the calls that are still on it,
    until the next renewal. It starts nothing and keeps at most two channels.
    """

    def __init__(
        self,
        target: str,
        provider: Provider,
        peer: Identity,
        options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        self._target, self._provider, self._peer = target, provider, peer
        self._options = [*options, server_name_option(peer)]
        self._chain = b""
        self._channels: list[grpc.Channel] = []

    def get(self) -> grpc.Channel:
        """The channel to use for the next call."""
        credentials = self._provider()
        if credentials.chain_pem != self._chain:
            self._channels.append(self._open(credentials))
            self._chain = credentials.chain_pem
        if len(self._channels) > 2:
            self._channels.pop(0).close()
        return self._channels[-1]

    def _open(self, credentials: Credentials) -> grpc.Channel:
        """On this machine ttRPC, which is ten times quicker; gRPC to everywhere else."""
        if self._target.startswith("unix:"):
            path = self._target.removeprefix("unix:")
            return cast(grpc.Channel, ttrpc.Channel(path, credentials, self._peer))
        return grpc.secure_channel(self._target, channel_credentials(credentials), self._options)

    def close(self) -> None:
        """End every call and both channels."""
        while self._channels:
            self._channels.pop().close()
        self._chain = b""


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """What a client's channel needs. `server_name_option` says whom it expects at the other end."""
    return grpc.ssl_channel_credentials(
        root_certificates=credentials.bundle_pem,
        private_key=credentials.key_pem,
        certificate_chain=credentials.chain_pem,
    )


def server_name_option(peer: Identity) -> tuple[str, str]:
    """The channel option that accepts this node or service and nobody else at the other end."""
    return ("grpc.ssl_target_name_override", spiffe.server_name(peer))


def read_private(path: Path) -> bytes:
    """A file that nobody but its owner may read."""
    data = _read(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise failure.of("IDENTITY", f"others can read {path.name}: make new keys, mode 0600")
    return data


def write_file(path: Path, data: bytes, *, mode: int) -> None:
    """Replace a file as a whole; durable when this returns."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # open() lets the umask take bits away
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise failure.of("STORAGE", f"{path.name}: {error.strerror}") from None
    _sync_directory(path.parent)


def make_private_directory(path: Path) -> None:
    """A folder of mode 0700 that is ours; one that others may enter is refused."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = path.stat()
    if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o077:
        raise failure.of("IDENTITY", f"the folder {path.name} must be ours alone (mode 0700)")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise failure.of("IDENTITY", f"{path.name}: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise failure.of("MESSAGE_SIZE", path.name)
    return data


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
