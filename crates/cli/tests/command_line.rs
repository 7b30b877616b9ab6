//! What the command line says when something is wrong.

use crate::fathom;

/// Standard error of a run that must fail.
fn failure(args: &[&str]) -> String {
    let output = fathom().args(args).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{text}");
    text
}

#[test]
fn a_missing_checkpoint_is_named_with_its_cause() {
    let text = failure(&["serve", "--port", "0", "--model", "/no/such/checkpoint"]);
    assert!(text.contains("error: opening the checkpoint /no/such/checkpoint"), "{text}");
    assert!(text.contains("  caused by: cannot read /no/such/checkpoint"), "{text}");
}

#[test]
fn a_config_without_weights_gets_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    let config = include_str!("../../../models/nano/config.json");
    std::fs::write(directory.path().join("config.json"), config).unwrap();
    let text = failure(&["serve", "--port", "0", "--model", directory.path().to_str().unwrap()]);
    assert!(text.contains("hint: `fathom inspect DIR` works without weights"), "{text}");
}

#[test]
fn a_taken_port_gets_a_hint_before_anything_is_loaded() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let text = failure(&["serve", "--port", &port]);
    assert!(text.contains("hint: another program listens there"), "{text}");
}

#[test]
fn impossible_limits_are_refused_with_both_numbers() {
    let text =
        failure(&["serve", "--port", "0", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"]);
    assert!(text.contains("max_num_batched_tokens is 8"), "{text}");
    assert!(text.contains("max_num_seqs (9)"), "{text}");
}

#[test]
fn a_chat_with_no_server_gets_a_hint() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = failure(&["chat", "--url", &format!("http://{free}")]);
    assert!(text.contains("hint: start a server"), "{text}");
}

/// Standard output of a run that must succeed.
fn output(args: &[&str]) -> String {
    let output = fathom().args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_help_of_serve_lists_every_setting() {
    insta::assert_snapshot!(output(&["serve", "--help"]));
}

#[test]
fn a_file_is_checked_without_serving() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("fathom.toml");
    let check = |text: &str| {
        std::fs::write(&file, text).unwrap();
        fathom().args(["config", "check"]).arg(&file).output().unwrap()
    };
    assert!(check(&output(&["config", "example"])).status.success());
    for (text, named) in [
        ("[limits]\nmax_n = -1", "limits.max_n"),
        ("[server]\ntls_cert = 'x'", "server.tls_key"),
        ("[telemetry]\notlp_endpoint = 'localhost:4318'", "telemetry.otlp_endpoint"),
        ("server = 5", "server"),
        ("[server", "line 1"),
    ] {
        let output = check(text);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(named), "{text}: {error}");
    }
    let schema: serde_json::Value = serde_json::from_str(&output(&["config", "schema"])).unwrap();
    assert_eq!(schema["properties"]["engine"]["properties"]["max_num_seqs"]["default"], 64);
    assert_eq!(schema["properties"]["server"]["properties"]["port"]["default"], 8000);
}

#[test]
fn a_variable_sets_what_its_flag_does() {
    let mut command = fathom();
    let output = command.args(["serve", "--port", "0"]).env("FATHOM_LIMITS_MAX_N", "many").output();
    let error = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(error.contains("--limits-max-n"), "{error}");
}

#[test]
fn the_version_is_that_of_the_package() {
    let output = fathom().arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.trim(), format!("fathom {}", env!("CARGO_PKG_VERSION")));
}
