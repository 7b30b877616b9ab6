//! What the surfaces call the fields that all of them have, for errors: a client finds a field under
//! the name that it sent.

/// The surface whose field names a request was written with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// `/v1/chat/completions`.
    #[default]
    Chat,
    /// `/v1/messages`.
    Messages,
    /// `/v1/responses`.
    Responses,
}

impl Dialect {
    /// What holds the conversation.
    #[must_use]
    pub const fn prompt(self) -> &'static str {
        match self {
            Self::Chat | Self::Messages => "messages",
            Self::Responses => "input",
        }
    }

    /// What says which form the answer has.
    #[must_use]
    pub const fn format(self) -> &'static str {
        match self {
            Self::Chat => "response_format",
            Self::Messages => "output_config.format",
            Self::Responses => "text.format",
        }
    }

    /// The schema of the answer.
    #[must_use]
    pub const fn format_schema(self) -> &'static str {
        match self {
            Self::Chat => "response_format.json_schema.schema",
            Self::Messages => "output_config.format.schema",
            Self::Responses => "text.format.schema",
        }
    }

    /// The schema of the arguments of a tool.
    #[must_use]
    pub fn tool_schema(self, index: usize) -> String {
        let field = match self {
            Self::Chat => "function.parameters",
            Self::Messages => "input_schema",
            Self::Responses => "parameters",
        };
        format!("tools[{index}].{field}")
    }

    /// An answer that the client began.
    #[must_use]
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Chat => "an assistant `prefix`",
            Self::Messages | Self::Responses => "a last message of the assistant",
        }
    }

    /// The reasoning of the message number `index`, as the chat surface counts: a field, and what it
    /// must hold. The other surfaces write one message in several parts, of which none has its number.
    #[must_use]
    pub fn reasoning(self, index: usize) -> (String, &'static str) {
        match self {
            Self::Chat => (format!("messages[{index}].reasoning_content"), "reasoning"),
            Self::Messages => ("messages".to_owned(), "a `thinking` block"),
            Self::Responses => ("input".to_owned(), "a `reasoning` item"),
        }
    }
}
