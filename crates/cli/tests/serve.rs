//! `fathom serve`: settings from a file, the start-up print, the signal.
//!
//! Not here: what it answers over HTTP (the server crate's tests, and the end-to-end script).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::fathom;

/// A server of the embedded model, stopped when dropped.
pub(crate) struct Server {
    process: Child,
    /// Start-up print.
    pub(crate) banner: String,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        Self::start_as(fathom(), args)
    }

    /// The same with a binary that has settings of its own.
    pub(crate) fn start_as(mut fathom: Command, args: &[&str]) -> Self {
        let mut process = fathom
            .arg("serve")
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut banner = String::new();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        while !banner.contains("curl ") {
            assert_ne!(output.read_line(&mut banner).unwrap(), 0, "ended early: {banner}");
        }
        let url = banner.split("listening http://").nth(1).unwrap();
        let address = url.split_whitespace().next().unwrap().to_owned();
        Self { process, banner, address }
    }

    /// The whole response to a GET.
    fn get(&self, path: &str) -> String {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    }

    /// The answer to one message: its text, tokens of the prompt, those of them that were cached.
    pub(crate) fn ask(&self, message: &str) -> (String, u64, u64) {
        let response = self.post(message, 8);
        let (_, json) = response.split_once("\r\n\r\n").unwrap();
        let json: serde_json::Value = serde_json::from_str(json).expect(&response);
        let usage = &json["usage"];
        let cached = &usage["prompt_tokens_details"]["cached_tokens"];
        (
            json["choices"][0]["message"]["content"].to_string(),
            usage["prompt_tokens"].as_u64().unwrap(),
            cached.as_u64().unwrap(),
        )
    }

    /// The whole response to one message.
    pub(crate) fn post(&self, message: &str, max_tokens: u32) -> String {
        let body = serde_json::json!({
            "model": "nano", "messages": [{"role": "user", "content": message}],
            "max_tokens": max_tokens, "temperature": 0, "thinking": {"type": "disabled"},
        });
        let body = body.to_string();
        self.exchange(&format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    fn exchange(&self, request: &str) -> String {
        let mut socket = TcpStream::connect(&self.address).unwrap();
        socket.write_all(request.as_bytes()).unwrap();
        let mut response = String::new();
        socket.read_to_string(&mut response).unwrap();
        response
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_start_up_print_tells_names_memory_and_address() {
    let server = Server::start(&["--port", "0"]);
    for expected in [
        "serves nano (also called deepseek-v4-flash)",
        "embedded; random, so answers are noise",
        "bf16 on the CPU",
        "64 sequences at once, 1024 tokens per step",
        "kv cache",
    ] {
        assert!(server.banner.contains(expected), "{}", server.banner);
    }
    let ready = server.get("/ready");
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("nano"), "{ready}");
}

#[test]
fn a_file_sets_what_no_flag_does() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("fathom.toml");
    let settings = "[server]\nport = 0\n[limits]\nmax_model_len = 2048\n\
                    [engine]\nserved_model_name = ['tiny']\nmax_num_seqs = 3\nnumerics = 'f32'\n";
    std::fs::write(&file, settings).unwrap();
    let server = Server::start(&["--config", file.to_str().unwrap(), "--max-num-seqs", "5"]);
    for expected in ["serves tiny", "f32 on the CPU", "2048 tokens of context, 5 sequences"] {
        assert!(server.banner.contains(expected), "{}", server.banner);
    }
    assert!(server.get("/v1/models").contains("\"id\":\"tiny\""));
}

#[test]
fn a_hang_up_signal_reads_the_keys_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.toml");
    std::fs::write(&file, "[[keys]]\nkey = 'old'\n").unwrap();
    let server = Server::start(&["--port", "0", "--server-keys-file", file.to_str().unwrap()]);
    let passes = |key: &str| {
        let request = format!(
            "GET /v1/models HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nConnection: close\r\n\r\n"
        );
        server.exchange(&request).starts_with("HTTP/1.1 200")
    };
    assert!(passes("old") && !passes("new"));
    std::fs::write(&file, "[[keys]]\nkey = 'new'\n").unwrap();
    let pid = server.process.id().to_string();
    assert!(std::process::Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
    while !passes("new") {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!passes("old"));
}

#[test]
fn a_directory_is_served_as_the_same_files_inside_the_binary_are() {
    let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano");
    let from_disk = Server::start(&["--port", "0", "--model", nano]);
    assert!(from_disk.banner.contains("serves nano\n"), "{}", from_disk.banner);
    let embedded = Server::start(&["--port", "0"]);
    let weights = |server: &Server| {
        let line = server.banner.lines().find(|line| line.contains("weights")).unwrap().to_owned();
        line.split(',').next().unwrap().to_owned()
    };
    assert_eq!(weights(&from_disk), weights(&embedded));
}

/// Files of cached state in a cache directory.
#[test]
fn tokens_guessed_ahead_change_no_answer_and_are_counted() {
    let flags = ["--port", "0", "--threads", "1", "--max-model-len", "1024", "--max-num-seqs", "2"];
    let plain = Server::start(&flags).ask("Say it again.").0;
    for (who, in_banner) in [("mtp", "the MTP block"), ("ngram", "the text so far")] {
        let server = Server::start(&[&flags[..], &["--speculate", who]].concat());
        assert!(server.banner.contains(&format!("3 tokens guessed ahead by {in_banner}")));
        assert_eq!(server.ask("Say it again.").0, plain);
        let metrics = server.get("/metrics");
        let counted = metrics.contains("fathom_spec_decode_accepted_tokens_total{");
        assert!(counted, "{metrics}");
    }
}

fn n_files(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let namespaces = entries.filter(|path| path.is_dir());
    let files = namespaces.flat_map(|path| std::fs::read_dir(path).unwrap());
    files.filter(|file| !file.as_ref().unwrap().path().to_string_lossy().contains("tmp-")).count()
}

#[test]
fn a_killed_server_goes_on_from_its_cache_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let args = ["--port", "0", "--cache-dir", path, "--cache-disk-gb", "1"];
    let message = "The quick brown fox jumps over the lazy dog. ".repeat(60);

    let server = Server::start(&args);
    assert!(server.banner.contains("then up to 1.0 GiB in"), "{}", server.banner);
    let (answer, n_prompt, cached) = server.ask(&message);
    assert_eq!(cached, 0);
    let n_blocks = (n_prompt - 1) / 256;
    assert!(n_blocks >= 2, "the prompt has {n_prompt} tokens");
    // The blocks and a snapshot; writing them does not hold up the answer.
    while n_files(directory.path()) < n_blocks as usize + 1 {
        std::thread::sleep(Duration::from_millis(5));
    }
    // SIGKILL.
    drop(server);

    let server = Server::start(&args);
    assert_eq!(server.ask(&message), (answer, n_prompt, n_blocks * 256));
}
