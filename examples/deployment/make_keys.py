"""Make the certificates and node keys of a deployment: one call, nothing to install.

    python make_keys.py keys --host superlink.example.org --node clinic-a --node clinic-b

    keys/ca.crt          for everybody who connects to the SuperLink
    keys/ca.key          stays with whoever runs the server, offline if possible
    keys/server.crt/.key for the SuperLink
    keys/nodes/NAME      private key of a SuperNode; goes to that organisation alone
    keys/nodes/NAME.pub  its public key; the SuperLink is told it

An organisation that trusts nobody with its private key makes one itself
(`ssh-keygen -t ecdsa -b 384 -N "" -f NAME`) and sends the .pub file only.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey


def main() -> None:
    parser = argparse.ArgumentParser(description="Certificates and node keys of a deployment.")
    parser.add_argument("folder", type=Path, help="where the files go; nothing is overwritten")
    parser.add_argument("--host", action="append", default=[], help="name or IP of the SuperLink")
    parser.add_argument("--node", action="append", default=[], help="name of a SuperNode")
    parser.add_argument("--days", type=int, default=365, help="how long certificates are valid")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "ca.key").exists():
        authority(options.folder, options.days)
    if not (options.folder / "server.key").exists():
        server(options.folder, ["localhost", "127.0.0.1", *options.host], options.days)
    for name in options.node:
        node(options.folder / "nodes" / name)


def authority(folder: Path, days: int) -> None:
    """A certificate authority for this federation alone."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cgfedllm federation CA")])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    write_private(folder / "ca.key", key)
    write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def server(folder: Path, hosts: list[str], days: int) -> None:
    """The SuperLink's certificate, for every name it is reached by."""
    authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    authority_certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    assert isinstance(authority_key, Key)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[-1][:64])])
    certificate = (
        builder(subject, authority_certificate.subject, key, days)
        .add_extension(x509.SubjectAlternativeName([address(host) for host in hosts]), False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False
        )
        .sign(authority_key, hashes.SHA384())
    )
    write_private(folder / "server.key", key)
    write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def node(path: Path) -> None:
    """A SuperNode's key pair, as Flower reads it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, key)
    encoding = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    write(path.with_name(path.name + ".pub"), key.public_key().public_bytes(*encoding) + b"\n")


def builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def address(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    print(path)


def write_private(path: Path, key: Key) -> None:
    """Readable by its owner alone, from the moment it exists."""
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH
        if path.parent.name == "nodes"
        else serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    print(path)


if __name__ == "__main__":
    main()
