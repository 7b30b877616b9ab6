//! Server-sent events, as a chat client needs them: bytes in, one delta per event out.
//!
//! Not here: the connection the bytes come from (`client`).

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// What one event of a chat stream says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Delta {
    /// More of the model's reasoning.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// The answer ended for this reason.
    Finish(String),
    /// Token counts of the whole request: prompt, completion.
    Usage(String, String),
}

/// Cuts a byte stream into events. A cut anywhere, also inside a character, changes nothing.
#[derive(Debug, Default)]
pub(super) struct EventParser {
    buffer: Vec<u8>,
}

impl EventParser {
    /// Deltas of all events that `bytes` completes, in order.
    ///
    /// # Errors
    /// If an event is no JSON, or is the server's error envelope.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Delta>> {
        self.buffer.extend_from_slice(bytes);
        let mut deltas = Vec::new();
        while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
            let event =
                String::from_utf8(event).context("the server sent text that is no UTF-8")?;
            for data in event.lines().filter_map(|line| line.strip_prefix("data: ")) {
                if data != "[DONE]" {
                    deltas.extend(deltas_of(data)?);
                }
            }
        }
        Ok(deltas)
    }
}

fn deltas_of(data: &str) -> Result<Vec<Delta>> {
    let chunk: Value = serde_json::from_str(data).context("the server sent no JSON")?;
    if let Some(error) = chunk.get("error") {
        bail!("{}", error["message"].as_str().unwrap_or("the server failed"));
    }
    let mut deltas = Vec::new();
    if let Some(choice) = chunk["choices"].get(0) {
        let text = |field: &str| choice["delta"][field].as_str().filter(|text| !text.is_empty());
        deltas.extend(text("reasoning_content").map(|text| Delta::Reasoning(text.to_owned())));
        deltas.extend(text("content").map(|text| Delta::Content(text.to_owned())));
        let finish = choice["finish_reason"].as_str();
        deltas.extend(finish.map(|reason| Delta::Finish(reason.to_owned())));
    }
    if let Some(usage) = chunk.get("usage").filter(|usage| usage.is_object()) {
        let count = |field: &str| usage[field].to_string();
        deltas.push(Delta::Usage(count("prompt_tokens"), count("completion_tokens")));
    }
    Ok(deltas)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"reasoning_content\":\"\"},\"finish_reason\":null}]}\n\n",
        ": keep-alive\n\n",
        "data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"hm \u{6df1}\"},\"finish_reason\":null}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"},\"finish_reason\":null}]}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\n",
        "data: [DONE]\n\n",
    );

    fn expected() -> Vec<Delta> {
        vec![
            Delta::Reasoning("hm \u{6df1}".to_owned()),
            Delta::Content("hi".to_owned()),
            Delta::Finish("stop".to_owned()),
            Delta::Usage("3".to_owned(), "4".to_owned()),
        ]
    }

    #[test]
    fn a_stream_cut_anywhere_gives_the_same_deltas() {
        for at in 0..STREAM.len() {
            let (head, tail) = STREAM.as_bytes().split_at(at);
            let mut parser = EventParser::default();
            let mut deltas = parser.push(head).unwrap();
            deltas.extend(parser.push(tail).unwrap());
            assert_eq!(deltas, expected(), "cut at {at}");
        }
    }

    #[test]
    fn an_error_event_is_an_error_with_the_servers_message() {
        let event = b"data: {\"error\":{\"message\":\"out of memory\",\"code\":\"x\"}}\n\n";
        let error = EventParser::default().push(event).unwrap_err();
        assert_eq!(error.to_string(), "out of memory");
    }
}
