"""Plain TLS with the same certificates as gRPC's: for connections that speak another protocol.

Rules. Version 1.3 and both certificates, always; a session is never resumed, so each connection is
looked at anew. The standard library reads keys from files only: they lie in memory under a
descriptor for as long as that takes, and nowhere else.
"""

from __future__ import annotations

import os
import ssl

from grafos_core import failure, spiffe
from grafos_core.spiffe import Identity
from grafos_proto.wire import certificates
from grafos_proto.wire.certificates import Certificate
from grafos_proto.wire.credentials import Credentials


def server_context(ours: Credentials) -> ssl.SSLContext:
    """For a listener; whoever comes without a certificate of our fabric ends in the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    return _bound(context, ours)


def client_context(ours: Credentials) -> ssl.SSLContext:
    """For a caller, who says with `server_name` whom he expects."""
    return _bound(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ours)


def server_name(peer: Identity) -> str:
    """What the certificate at the other end must be for."""
    return spiffe.server_name(peer)


def shown(sock: ssl.SSLSocket) -> Certificate:
    """Whose certificate the other end has proved in the handshake."""
    der = sock.getpeercert(binary_form=True)
    if not der:
        raise failure.of("IDENTITY", "no certificate was shown")
    return certificates.parse(ssl.DER_cert_to_PEM_cert(der).encode())


def _bound(context: ssl.SSLContext, ours: Credentials) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ours.bundle_pem.decode("ascii"))
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, ours.key_pem + b"\n" + ours.chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context
