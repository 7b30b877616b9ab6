//! Texts to measure with: this repository's own code and documentation, and Chinese made of words.
//!
//! All of them are the same in every run. Not here: what is measured.

use std::path::{Path, PathBuf};

use fathom_chat::{Conversation, Message};

/// All Rust code of the repository, but for spellings of control tokens: in a finished prompt those
/// are the one thing that we and the release's raw pipeline read differently.
///
/// # Panics
/// If the sources are not where this crate was built from.
#[must_use]
pub fn rust() -> String {
    let mut paths = Vec::new();
    find(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates"), &mut paths);
    paths.sort();
    let texts = paths.iter().map(|path| std::fs::read_to_string(path).expect("a source file"));
    let all: String = texts.collect();
    all.replace('\u{ff5c}', "|").replace("think>", "thought>")
}

fn find(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources").flatten() {
        let path = entry.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            find(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// The prose of the repository: what its code says in comments for readers.
#[must_use]
pub fn english() -> String {
    let mut text = String::new();
    for line in rust().lines() {
        let line = line.trim_start();
        let prose = ["//! ", "/// ", "// "].iter().find_map(|mark| line.strip_prefix(mark));
        match prose {
            Some(prose) => {
                text.push_str(prose);
                text.push(' ');
            }
            None if text.ends_with(". ") => {
                text.pop();
                text.push_str("\n\n");
            }
            None => {}
        }
    }
    text
}

/// Words that sentences are made of.
const WORDS: [&str; 48] = [
    "我们", "服务", "请求", "模型", "可以", "因为", "所以", "数据", "计算", "时间", "问题", "回答",
    "的", "了", "在", "是", "和", "不", "也", "就", "人工", "智能", "推理", "引擎", "缓存", "文本",
    "用户", "工具", "调用", "结果", "返回", "这个", "那个", "如果", "但是", "已经", "需要", "非常",
    "快速", "准确", "安全", "长", "短", "新", "旧", "每一", "所有", "其中",
];

/// About 200 KB of sentences.
#[must_use]
pub fn chinese() -> String {
    let mut random = Random(5);
    let mut text = String::new();
    while text.len() < 200_000 {
        text.push_str(WORDS[random.below(WORDS.len())]);
        match random.below(12) {
            0 => text.push('，'),
            1 => text.push_str("。\n"),
            2 => text.push_str(" 42 "),
            _ => {}
        }
    }
    text
}

/// Texts in which a tokenizer finds no place to cut, or nothing to merge.
#[must_use]
pub fn hostile() -> Vec<(&'static str, String)> {
    let mut random = Random(11);
    let mut letters = |alphabet: &[u8]| -> String {
        (0..1 << 20).map(|_| char::from(alphabet[random.below(alphabet.len())])).collect()
    };
    vec![
        ("one letter", "a".into()),
        ("spaces", " ".into()),
        ("line ends", "\n".into()),
        ("one punctuation mark", "-".into()),
        ("one Chinese character", "中".into()),
        ("combining marks", "e\u{301}".into()),
        ("emoji", "🎉".into()),
        ("a word without spaces", "the".into()),
        ("random letters", letters(b"abcdefghijklmnopqrstuvwxyz")),
        ("random letters, two", letters(b"ab")),
        ("letters that never merge", "qxzjvkwq".into()),
        ("unassigned characters", "\u{e000}\u{e001}".into()),
    ]
}

/// A conversation of about `n_bytes`: questions in English, answers with code, some Chinese.
#[must_use]
pub fn conversation(n_bytes: usize) -> Conversation {
    let (code, prose, chinese) = (rust(), english(), chinese());
    let mut random = Random(3);
    let mut slice = |text: &str, most: usize| -> String {
        let len = most / 2 + random.below(most / 2);
        let start = text.floor_char_boundary(random.below(text.len() - most));
        text[start..text.floor_char_boundary(start + len)].to_owned()
    };
    let mut messages = vec![Message::system(slice(&prose, 2000))];
    let mut total = 0;
    while total < n_bytes {
        let asked = slice(&prose, 900);
        let answer = format!(
            "{}\n\n```rust\n{}\n```\n\n{}",
            slice(&prose, 600),
            slice(&code, 2400),
            slice(&chinese, 300)
        );
        total += asked.len() + answer.len();
        messages.push(Message::user(asked));
        messages.push(Message::assistant(answer));
    }
    messages.push(Message::user("Go on."));
    Conversation { messages, ..Conversation::default() }
}

/// The same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (((self.0 >> 32) * limit as u64) >> 32) as usize
    }
}
