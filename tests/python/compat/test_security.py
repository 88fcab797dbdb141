"""Signed messages: good ones run, all others are logged and settled and cost nothing else; and root with pickle."""

import datetime
import json
import os
import sys

import pytest
from support import command
from support.lines import lines
from support.worker import APPS

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

FORMS = {"redis": "redis", "amqp": "rpc://"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two signers; the certificate of one is in the store."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "store").mkdir()
    for name in ("known", "stranger"):
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        public = certificate.public_bytes(serialization.Encoding.PEM)
        (folder / f"{name}.key").write_bytes(private)
        (folder / f"{name}.crt").write_bytes(public)
        if name == "known":
            (folder / "store" / f"{name}.crt").write_bytes(public)
    return folder


def act(stage, keys, what, **env):
    """What the app does as its own producer."""
    done = command.finish(
        [sys.executable, str(APPS / "signing.py"), what], APP_CONF=json.dumps(stage.conf), KEYS=str(keys),
        JOURNAL=str(stage.journal_path), PYTHONPATH=os.pathsep.join([str(APPS), str(APPS.parent)]), **env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def said(text):
    """The lines that tell of something wrong; what a decoder says in detail is its own affair."""
    return [(level, line[:26]) for level, _, line in lines(text) if level not in ("INFO", "WARNING")]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("broker", FORMS)
def test_what_is_not_signed_by_one_of_ours_does_not_run(alike, keys, broker):
    def scenario(stage):
        worker = stage.worker(app="signing", env={"KEYS": str(keys)})
        found = {"good": act(stage, keys, "signed"), "control": act(stage, keys, "control")}
        for what, env in (
            ("unsigned", {}),
            ("tampered", {}),
            ("garbage", {}),
            ("stranger", {"SIGNER": "stranger"}),
            ("unsigned_control", {}),
        ):
            before = len(worker.log)
            act(stage, keys, what, **env)
            worker.wait_log("deserialize", count=worker.log[:before].count("deserialize") + 1)
            # It goes on with what is signed.
            again = act(stage, keys, "signed")["value"]
            found[what] = [said(worker.log[before:]), again]
        stage.wait_empty()
        # Four tasks each of the six times that something signed came; the last is sent by another.
        ran = sorted((line["x"], line["y"]) for line in stage.wait_journal("ran", count=24))
        return {**found, "ran": ran, "status": worker.stop()}

    seen = alike(scenario, broker, FORMS[broker])
    assert seen["good"] == {"value": 3, "plain": False, "error": ["ValueError", "no"]}
    assert seen["control"][0] == [{"w0@here": {"ok": "pong"}}]
    assert {(5, 5), (1, 9), (1, 1)}.isdisjoint(map(tuple, seen["ran"]))
    for what in ("unsigned", "tampered", "garbage", "stranger", "unsigned_control"):
        assert seen[what][1] == 3


@pytest.mark.ours
@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_a_signed_message_for_a_worker_that_cannot_verify_it_is_rejected(kind, stage_on, keys, broker):
    """The original ends with status 1, and again at each start."""
    stage = stage_on(kind, broker)
    worker = stage.worker()
    act(stage, keys, "stranger")
    worker.wait_log("Received invalid task message")
    assert stage.send("add", 1, 2).get(timeout=30) == 3
    stage.wait_empty()
    assert worker.stop() == 0


def test_root_is_refused_where_pickle_is_accepted(alike):
    if os.geteuid() != 0:
        pytest.skip("only root is refused")

    def scenario(stage):
        refused = stage.worker(conf={"accept_content": ["json", "pickle"]}, env={"C_FORCE_ROOT": ""}, ready=False)
        status = refused.wait()
        forced = stage.worker(conf={"accept_content": ["json", "pickle"]})
        plain = stage.worker(env={"C_FORCE_ROOT": ""})
        return {
            "status": status,
            "says": [line for line in refused.log.splitlines() if "superuser" in line][-1:],
            "forced": forced.stop(),
            "warned": "SecurityWarning" in plain.log,
            "plain": plain.stop(),
        }

    assert alike(scenario)["status"] != 0
