//! `fathom chat`: a conversation in the terminal, with a running server or one started for it.
//!
//! Without `--url` a server for `--model` (the embedded model by default) is started in this
//! process on a free local port, so that both cases are the same client over HTTP.
//!
//! Not here: the protocol (`client`, `sse`), what the user may type (`session`).

mod client;
mod session;
mod sse;

use std::borrow::Cow;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use client::{Answer, Server};
use session::{Input, Session};
use sse::Delta;

use crate::serve::{self, ServeOptions};

const HELP: &str = "\
/think on|off   let the model reason before it answers, or not
/reset          forget the conversation
/quit           leave (so does the end of input)
Ctrl-C          stop the answer; between answers: leave";

/// Arguments of `fathom chat`.
#[derive(Debug, clap::Args)]
pub(crate) struct ChatArgs {
    /// A running server, such as http://127.0.0.1:8000
    #[arg(long, conflicts_with = "model")]
    url: Option<String>,
    /// Checkpoint directory to serve for this conversation; the embedded model by default
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Name of the model to ask for; by default the first one the server lists
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Key of the server
    #[arg(long, env = "FATHOM_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Longest answer in tokens, reasoning included; 512 for the embedded model
    #[arg(long)]
    max_tokens: Option<u32>,
    /// Begin without reasoning
    #[arg(long)]
    no_think: bool,
}

/// Runs the conversation until the user leaves.
pub(crate) fn run(args: ChatArgs) -> Result<()> {
    let runtime = serve::runtime()?;
    runtime.block_on(async {
        let (url, running) = match args.url {
            Some(url) => (url, None),
            None => {
                let options = ServeOptions::local(args.model.as_deref(), args.api_key.as_deref());
                let running = serve::start(options).await?;
                (running.url(), Some(running))
            }
        };
        // The embedded model hardly ever ends by itself: it answers noise.
        let embedded = running.is_some() && args.model.is_none();
        let max_tokens = args.max_tokens.or(embedded.then_some(512));
        let server = Server::new(&url, args.api_key)?;
        let name = match args.name {
            Some(name) => name,
            None => server.first_model().await?,
        };
        let session = Session::new(name, !args.no_think, max_tokens);
        let result = Terminal::new(server, session).converse().await;
        if let Some(running) = running {
            running.stop().await;
        }
        result
    })
}

struct Terminal {
    server: Server,
    session: Session,
    /// Terminal sequences around reasoning; empty where output is no terminal.
    dim: [&'static str; 2],
    lines: mpsc::UnboundedReceiver<String>,
}

impl Terminal {
    fn new(server: Server, session: Session) -> Self {
        let is_terminal = std::io::stdout().is_terminal();
        let dim = if is_terminal { ["\u{1b}[2m", "\u{1b}[0m"] } else { ["", ""] };
        Self { server, session, dim, lines: read_lines() }
    }

    async fn converse(mut self) -> Result<()> {
        println!("talking to {}; /help for help", self.session.model());
        loop {
            print!("\n> ");
            std::io::stdout().flush().context("writing to the terminal")?;
            let line = tokio::select! {
                line = self.lines.recv() => line,
                _ = tokio::signal::ctrl_c() => None,
            };
            let Some(line) = line else { break };
            match Input::parse(&line) {
                Input::Empty => {}
                Input::Quit => return Ok(()),
                Input::Help => println!("{HELP}"),
                Input::Reset => {
                    self.session.reset();
                    println!("forgotten");
                }
                Input::Think(on) => {
                    self.session.set_thinking(on);
                    println!("thinking is {}", if on { "on" } else { "off" });
                }
                Input::Unknown(command) => println!("{command} is no command; /help lists them"),
                Input::Message(text) => {
                    if let Err(error) = self.turn(text).await {
                        println!("{}\nerror: {error:#}", self.dim[1]);
                    }
                }
            }
        }
        println!();
        Ok(())
    }

    /// Asks, shows the answer as it comes, and remembers both unless the answer was stopped.
    async fn turn(&mut self, question: &str) -> Result<()> {
        let start = Instant::now();
        let mut answer = self.server.complete(&self.session.request(question)).await?;
        let shown = tokio::select! {
            shown = self.show(&mut answer) => shown?,
            _ = tokio::signal::ctrl_c() => {
                println!("{} [stopped]", self.dim[1]);
                return Ok(());
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        let [dim, plain] = self.dim;
        println!("\n{dim}[{}; {seconds:.1} s]{plain}", shown.note);
        self.session.answered(question, shown.content);
        Ok(())
    }

    async fn show(&self, answer: &mut Answer) -> Result<Shown> {
        let [dim, plain] = self.dim;
        let mut shown = Shown { content: String::new(), note: String::new() };
        let mut reasoning = false;
        while let Some(delta) = answer.next().await? {
            match delta {
                Delta::Reasoning(text) => {
                    let begin = if reasoning { "" } else { dim };
                    reasoning = true;
                    print!("{begin}{}", printable(&text));
                }
                Delta::Content(text) => {
                    let end = if reasoning { "\n" } else { "" };
                    let reset = if reasoning { plain } else { "" };
                    reasoning = false;
                    print!("{reset}{end}{}", printable(&text));
                    shown.content.push_str(&text);
                }
                Delta::Finish(reason) => shown.note.push_str(&reason),
                Delta::Usage(prompt, completion) => {
                    shown.note.push_str(&format!("; {prompt} + {completion} tokens"));
                }
            }
            std::io::stdout().flush().context("writing to the terminal")?;
        }
        if reasoning {
            print!("{plain}");
        }
        Ok(shown)
    }
}

/// `text` with control characters as their pictures: a model may say what a terminal would obey.
fn printable(text: &str) -> Cow<'_, str> {
    let is_obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let picture = |c: char| match c as u32 {
        code @ 0..0x20 => char::from_u32(0x2400 + code).unwrap_or(char::REPLACEMENT_CHARACTER),
        0x7F => '\u{2421}',
        _ => char::REPLACEMENT_CHARACTER,
    };
    text.chars().map(|c| if is_obeyed(c) { picture(c) } else { c }).collect()
}

struct Shown {
    content: String,
    note: String,
}

/// Lines of standard input. A thread of its own reads them: a blocking read inside the runtime
/// would keep it from ending.
fn read_lines() -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn what_a_terminal_would_obey_is_shown_as_pictures() {
        let said = "a\u{1b}[2J\u{7}\r\u{7f}\u{9b}b\n\tc\u{e9}";
        assert_eq!(printable(said), "a\u{241b}[2J\u{2407}\u{240d}\u{2421}\u{fffd}b\n\tc\u{e9}");
        assert_eq!(printable("plain\ttext\n"), "plain\ttext\n");
    }
}
