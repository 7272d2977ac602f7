"""Keys, and loading what they have signed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kan_bundle.layout import BundleFolder
from kan_bundle.signature import read_public_key
from serving.models.loading import Admission, LoadedModel, load_bundle
from tests.loading import LIMITS, make_engine


@dataclass(frozen=True)
class Keys:
    """A pair of keys, as PEM files."""

    private: Path
    public: Path


def write_keys(folder: Path, name: str, key: Any, password: str | None = None) -> Keys:
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password.encode())
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    keys.private.write_bytes(key.private_bytes(pem, form, encryption))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    keys.public.write_bytes(key.public_key().public_bytes(pem, public))
    return keys


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Those of who may sign."""
    key = ec.generate_private_key(ec.SECP256R1())
    return write_keys(tmp_path_factory.mktemp("keys"), "key", key)


def load(folder: BundleFolder, keys: Keys) -> LoadedModel:
    admission = Admission(signer=read_public_key(keys.public))
    return load_bundle(folder, make_engine, LIMITS, admission=admission)
