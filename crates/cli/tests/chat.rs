//! `fathom chat` with its input from a pipe.

use std::io::Write;
use std::process::Stdio;

use crate::fathom;

/// What the conversation prints for these lines of input.
fn converse(args: &[&str], input: &str) -> String {
    let mut chat = fathom()
        .arg("chat")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    chat.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = chat.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn a_conversation_with_the_embedded_model_ends_with_the_input() {
    let text = converse(&["--max-tokens", "9", "--no-think"], "Hello\nAnd?\n");
    assert!(text.contains("talking to nano"), "{text}");
    let notes = text.lines().filter(|line| line.ends_with(" s]") && line.contains(" + ")).count();
    assert_eq!(notes, 2, "{text}");
    assert!(text.contains("[length; "), "{text}");
    // No terminal, no terminal sequences.
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn commands_are_obeyed_and_unknown_ones_are_not_sent() {
    let text = converse(&[], "/think off\n/reset\n/nonsense\n/help\n/quit\nnever read\n");
    assert!(text.contains("thinking is off"), "{text}");
    assert!(text.contains("forgotten"), "{text}");
    assert!(text.contains("/nonsense is no command"), "{text}");
    assert!(text.contains("leave (so does the end of input)"), "{text}");
    assert!(!text.contains("tokens;"), "{text}");
}
