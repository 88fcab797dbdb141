//! Ways in: TLS, a socket file, databases.

use std::path::Path;
use std::process::Command;

use celeriac::backend::redis::RedisBackend;
use celeriac::backend::{BackendConfig, ResultBackend};
use celeriac::broker::by_url;
use celeriac::error::BrokerError;
use serde_json::{Value, json};

use super::{conformance, consume};
use crate::broker::client::Client;
use crate::broker::message;
use crate::support::folder::Folder;
use crate::support::process::program;
use crate::support::redis::RedisServer;

/// An authority and a certificate of its for `localhost`, in this folder. None: no openssl here.
fn certificates(folder: &Path) -> Option<()> {
    let openssl = program("openssl")?;
    let run = |arguments: &[&str]| {
        let output = Command::new(&openssl).current_dir(folder).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    std::fs::write(folder.join("san"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let with_key = |rest: &[&'static str]| [&["req"][..], &key, rest].concat();
    run(&with_key(&["-x509", "-subj", "/CN=authority", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem"]));
    run(&with_key(&["-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr"]));
    run(&[
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "san",
        "-out",
        "server.pem",
    ]);
    Some(())
}

async fn works(url: &str, ssl: Value) -> Result<(), BrokerError> {
    let mut config = conformance::config(json!({}));
    config.use_ssl = ssl;
    let broker = by_url(url, &config)?.expect("Redis is spoken natively");
    broker.connect(&consume(&["q"], 1)).await.map(drop)?;
    let client = Client::connect(&*broker, &consume(&["q"], 1)).await;
    client.send("elsewhere", message("one")).await;
    client.close().await;
    Ok(())
}

#[tokio::test]
async fn certificates_are_verified_as_far_as_is_asked_for() {
    let folder = Folder::new();
    if certificates(folder.path()).is_none() {
        return;
    }
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let port = crate::support::process::free_port();
    let tls = [
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &path("server.pem"),
        "--tls-key-file",
        &path("server.key"),
        "--tls-ca-cert-file",
        &path("ca.pem"),
    ]
    .map(str::to_owned);
    let mut options: Vec<&str> = tls.iter().map(String::as_str).collect();
    let Some(server) = RedisServer::with(&[&options[..], &["--tls-auth-clients", "no"]].concat()) else {
        return;
    };
    let url = format!("rediss://localhost:{port}/0");
    let (ca, address) = (path("ca.pem"), url.replace("localhost", "127.0.0.1"));
    let none = json!({"ssl_cert_reqs": "CERT_NONE"});
    let required = json!({"ssl_cert_reqs": "CERT_REQUIRED", "ssl_ca_certs": ca});
    let other_name = json!({"ssl_cert_reqs": 2, "ssl_ca_certs": ca, "ssl_check_hostname": false});
    works(&url, none.clone()).await.unwrap();
    works(&url, Value::Null).await.unwrap();
    works(&url, required.clone()).await.unwrap();
    works(&address, other_name.clone()).await.unwrap();
    works(&format!("{address}?ssl_cert_reqs=none"), Value::Null).await.unwrap();
    // Unknown authority; a certificate for another name; TLS where none is spoken.
    works(&url, json!({"ssl_cert_reqs": "CERT_REQUIRED"})).await.unwrap_err();
    works(&address, required.clone()).await.unwrap_err();
    works(&server.url().replace("redis://", "rediss://"), none.clone()).await.unwrap_err();

    let backend = |url: String, use_ssl: Value| {
        let config = BackendConfig { url, native: true, use_ssl, ..BackendConfig::default() };
        RedisBackend::new(&config).map(|backend| backend.expect("Redis is spoken natively"))
    };
    assert_eq!(backend(url.clone(), required).unwrap().get("x").await.unwrap(), None);
    assert_eq!(
        backend(format!("{url}?ssl_cert_reqs=CERT_NONE"), Value::Null).unwrap().get("x").await.unwrap(),
        None
    );
    assert!(backend(url, json!({"ssl_cert_reqs": "CERT_REQUIRED"})).unwrap().get("x").await.is_err());

    // A server that wants to see a certificate of ours.
    let port = crate::support::process::free_port().to_string();
    options[1] = &port;
    let Some(_strict) = RedisServer::with(&[&options[..], &["--tls-auth-clients", "yes"]].concat()) else {
        return;
    };
    let url = format!("rediss://localhost:{port}/0");
    let mine = json!({
        "ssl_cert_reqs": "required", "ssl_ca_certs": ca, "ssl_certfile": path("server.pem"),
        "ssl_keyfile": path("server.key"),
    });
    works(&url, mine).await.unwrap();
    works(&url, none).await.unwrap_err();
}

#[tokio::test]
async fn a_socket_file_and_a_database_are_reached() {
    let folder = Folder::new();
    let socket = folder.path().join("redis.sock").to_str().unwrap().to_owned();
    let Some(server) = RedisServer::with(&["--unixsocket", &socket]) else { return };
    for (url, database) in [
        (format!("redis+socket://{socket}?virtual_host=3"), 3),
        (format!("socket://{socket}"), 0),
        (server.url().replace("/0", "/5"), 5),
    ] {
        works(&url, Value::Null).await.unwrap();
        let mut redis = conformance::connection(&server.url().replace("/0", &format!("/{database}"))).await;
        let length: usize = redis::cmd("LLEN").arg("elsewhere").query_async(&mut redis).await.unwrap();
        assert_eq!(length, 1, "{url}");
    }
}

#[tokio::test]
async fn a_wrong_address_is_refused_before_anything_is_connected() {
    assert!(by_url("sentinel://localhost:26379/0", &conformance::config(json!({}))).unwrap().is_none());
    for url in ["redis://localhost/abc", "redis://localhost:port/0"] {
        let Err(error) = by_url(url, &conformance::config(json!({}))) else { panic!("{url} was accepted") };
        assert!(matches!(error, BrokerError::Address { .. }), "{url}: {error}");
    }
    let Err(error) = by_url("redis://localhost/0", &conformance::config(json!({"ack_emulation": false})))
    else {
        panic!("ack_emulation=False was accepted")
    };
    assert!(error.to_string().contains("ack_emulation"), "{error}");
}
