//! TLS: certificates, what is negotiated, and a certificate that changes while the server runs.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::json;

use crate::client::connect;
use crate::rig::{Rig, saying};

/// Writes a certificate for `localhost` and its key; returns what a client must trust.
fn certify(directory: &Path) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(directory.join("tls.crt"), cert.pem()).unwrap();
    std::fs::write(directory.join("tls.key"), signing_key.serialize_pem()).unwrap();
    cert.der().clone()
}

fn rig(directory: &Path) -> Rig {
    Rig::configured(|config| {
        config.server.tls_cert = Some(directory.join("tls.crt"));
        config.server.tls_key = Some(directory.join("tls.key"));
    })
}

/// Connects as a client that trusts `root` and offers `protocols`.
fn encrypted(
    rig: &Rig,
    root: &CertificateDer<'static>,
    protocols: &[&[u8]],
) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    StreamOwned::new(connection, connect(rig.address))
}

#[test]
fn an_answer_comes_encrypted() {
    let directory = tempfile::tempdir().unwrap();
    let root = certify(directory.path());
    let rig = rig(directory.path());
    let mut stream = encrypted(&rig, &root, &[b"http/1.1"]);
    let body = saying("Hi", &json!({"stream": true})).to_string();
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-length: {length}\r\n\r\n"
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("data: [DONE]"));
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
}

#[test]
fn http2_is_negotiated_with_clients_that_know_it() {
    let directory = tempfile::tempdir().unwrap();
    let root = certify(directory.path());
    let rig = rig(directory.path());
    let mut stream = encrypted(&rig, &root, &[b"h2", b"http/1.1"]);
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(frame[3], 4, "the server's first frame is SETTINGS");
}

#[test]
fn who_speaks_no_tls_gets_no_answer_and_disturbs_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let root = certify(directory.path());
    let rig = rig(directory.path());
    let mut plain = connect(rig.address);
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // An alert of the TLS layer, or a reset; never an HTTP answer.
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    assert_eq!(health(&rig, &root).unwrap(), "HTTP/1.1 200 OK");
}

/// First line of the answer to a client that trusts `root`.
fn health(rig: &Rig, root: &CertificateDer<'static>) -> std::io::Result<String> {
    let mut stream = encrypted(rig, root, &[]);
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn a_renewed_certificate_is_shown_to_new_connections() {
    let directory = tempfile::tempdir().unwrap();
    let old = certify(directory.path());
    let rig = rig(directory.path());
    assert_eq!(health(&rig, &old).unwrap(), "HTTP/1.1 200 OK");
    let new = certify(directory.path());
    assert!(health(&rig, &new).is_err(), "nobody has said that the file is new");
    rig.reloader.reload().unwrap();
    assert_eq!(health(&rig, &new).unwrap(), "HTTP/1.1 200 OK");

    // A key that does not fit changes nothing.
    std::fs::write(directory.path().join("tls.key"), "no key").unwrap();
    assert!(rig.reloader.reload().unwrap_err().to_string().contains("tls.key"));
    assert_eq!(health(&rig, &new).unwrap(), "HTTP/1.1 200 OK");
}
