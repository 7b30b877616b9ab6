//! Below the requests: headers, slow bodies, large bodies, keep-alive, HTTP/2.

use std::io::{Read, Write};

use serde_json::json;

use crate::client::{connect, exchange, read_response};
use crate::rig::{Rig, saying};

#[test]
fn too_many_or_too_large_headers_get_an_envelope() {
    let rig = Rig::start();
    let many: String = (0..110).map(|i| format!("\r\nx-{i}: 1")).collect();
    let large: String = (0..20).map(|i| format!("\r\nx-{i}: {}", "v".repeat(4000))).collect();
    for headers in [many, large] {
        let response = exchange(rig.address, &format!("GET /health HTTP/1.1{headers}"), b"");
        assert_eq!(response.status, 431);
        assert_eq!(response.json()["error"]["code"], "headers_too_large");
    }
}

#[test]
fn a_body_that_does_not_come_times_out() {
    let rig = Rig::configured(|config| config.limits.body_idle_s = 1);
    let head = "POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 100";
    let response = exchange(rig.address, head, b"{\"model\":");
    assert_eq!(response.status, 408);
    assert_eq!(response.json()["error"]["code"], "request_timeout");
    assert_eq!(response.json()["error"]["type"], "timeout_error");
}

#[test]
fn a_client_that_never_finishes_its_head_is_dropped() {
    let rig = Rig::configured(|config| config.limits.head_s = 1);
    for head in [&b""[..], b"P", b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nx-slow"] {
        let mut connection = connect(rig.address);
        connection.write_all(head).unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
    }
}

#[test]
fn the_answer_to_a_huge_body_arrives_although_it_is_not_read() {
    let rig = Rig::start();
    let body = vec![b' '; 40 * 1024 * 1024];
    let response = rig.post_raw("/v1/chat/completions", "x-a: b", &body);
    assert_eq!(response.status, 413);
    assert_eq!(response.header("connection"), Some("close"));
}

#[test]
fn a_connection_serves_one_request_after_another() {
    let rig = Rig::start();
    let mut connection = connect(rig.address);
    let body = saying("Hi", &json!({"stream": true})).to_string();
    for last in [false, true] {
        let close = if last { "connection: close\r\n" } else { "" };
        let length = body.len();
        let head = format!(
            "POST /chat/completions HTTP/1.1\r\nhost: t\r\n{close}content-length: {length}\r\n\r\n"
        );
        connection.write_all((head + &body).as_bytes()).unwrap();
        if !last {
            let mut seen = String::new();
            while !seen.ends_with("0\r\n\r\n") {
                let mut byte = [0];
                connection.read_exact(&mut byte).unwrap();
                seen.push(char::from(byte[0]));
            }
        }
    }
    assert!(read_response(&mut connection).body.ends_with("data: [DONE]\n\n"));
}

#[test]
fn http2_is_spoken_without_being_negotiated() {
    let rig = Rig::start();
    let mut connection = connect(rig.address);
    // The preface and an empty SETTINGS frame.
    connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    connection.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "the server's first frame is SETTINGS");
}

#[test]
fn http2_answers_requests_without_being_negotiated() {
    let rig = Rig::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (status, body) = runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(rig.address).await.unwrap();
        let io = hyper_util::rt::TokioIo::new(stream);
        let executor = hyper_util::rt::TokioExecutor::new();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(executor, io).await.unwrap();
        let said = saying("Hi", &json!({"stream": true})).to_string();
        let request = hyper::Request::post("http://t/v1/chat/completions")
            .body(http_body_util::Full::new(bytes::Bytes::from(said)))
            .unwrap();
        let exchange = async {
            let response = sender.send_request(request).await.unwrap();
            let status = response.status();
            let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
            (status, String::from_utf8(body.to_bytes().to_vec()).unwrap())
        };
        tokio::select! {
            answered = exchange => answered,
            ended = connection => panic!("the connection ended: {ended:?}"),
        }
    });
    assert_eq!(status, 200);
    assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
}

#[test]
fn garbage_is_answered_or_closed_but_never_fatal() {
    let rig = Rig::start();
    for garbage in [&b"\0\0\0\0\r\n\r\n"[..], b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"] {
        let mut connection = connect(rig.address);
        connection.write_all(garbage).unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
    }
    assert_eq!(rig.get("/health").status, 200);
}
