"""How a server shows who it is, and how it knows who calls.

Rules. TLS is mutual everywhere, and a certificate is judged at every call, because gRPC looks at it
in the handshake only and then never again: one that runs out on an open connection would go on
working. A server's own certificate is asked for anew at each handshake, so that a renewal needs no
restart. Reading and storing certificates, and asking for them, is shared with the SDK:
grafos_proto.wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import grpc

from grafos_core import failure
from grafos_core.spiffe import Role
from grafos_proto.wire import certificates, identity
from grafos_proto.wire.certificates import Certificate
from grafos_proto.wire.credentials import Credentials, IdentityFiles, Provider


def server_credentials(provider: Provider) -> grpc.ServerCredentials:
    """What a listener needs: clients without a certificate of this fabric end in the handshake."""
    shown = provider()

    def configuration() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        latest = provider()
        if latest == shown:
            return None  # to gRPC: as before
        shown = latest
        return _configuration(latest)

    fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], configuration)  # or None
    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown), fetch, require_client_authentication=True
    )


def caller(context: grpc.ServicerContext, now_ms: int) -> Certificate:
    """Who calls, at this call: identity, thumbprint of the key, and a certificate in force."""
    auth_context = cast(Mapping[str, Iterable[bytes]], context.auth_context())  # the stubs err
    return caller_of(auth_context, now_ms)


def caller_of(auth_context: Mapping[str, Iterable[bytes]], now_ms: int) -> Certificate:
    """As `caller`, from what gRPC says of the connection."""
    shown = list(auth_context.get("x509_pem_cert", ()))
    if len(shown) != 1:
        raise failure.of("IDENTITY", "the caller shows no certificate")
    certificate = certificates.parse(shown[0])
    certificate.check_fresh(now_ms)
    return certificate


def check_role(certificate: Certificate, *allowed: Role) -> Certificate:
    """Give the caller back if it has one of the roles."""
    if certificate.identity.role not in allowed:
        raise failure.of("ROLE")
    return certificate


def first_identity(
    files: IdentityFiles, socket_path: str, secret_descriptor: int, *, now_ms: int
) -> Credentials:
    """The certificate of a service that its supervisor has just started, asked for and stored.

    The key in the folder is used again if there is one: whatever is bound to it outlives restarts.
    """
    secret = identity.read_spawn_secret(secret_descriptor)
    files.save(identity.request_identity(socket_path, files.key(), secret=secret, now_ms=now_ms))
    return files()


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(credentials.key_pem, credentials.chain_pem)], credentials.bundle_pem
    )
